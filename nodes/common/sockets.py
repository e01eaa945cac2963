"""Where our nodes stand in ComfyUI's menu, and the types of the sockets that only they have."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "WanVideoWrapper/XDitUSP"
DISTRIFUSION_CATEGORY = "WanVideoWrapper/Official DistriFusion"
XDITUSPCONFIG = io.Custom("XDITUSPCONFIG")
DISTRIFUSION_MODEL = io.Custom("OFFICIAL_DISTRIFUSION_MODEL,MODEL")
