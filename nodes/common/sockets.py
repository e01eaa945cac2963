"""The places of our nodes in ComfyUI's menu, and the types of the sockets that only these nodes have."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "WanVideoWrapper/XDitUSP"
DISTRIFUSION_CATEGORY = "WanVideoWrapper/Official DistriFusion"
XDITUSPCONFIG = io.Custom("XDITUSPCONFIG")
DISTRIFUSION_MODEL = io.Custom("OFFICIAL_DISTRIFUSION_MODEL,MODEL")
