"""Importing this registers the pack as `wan_parallel`: in pytest, and in the processes that tests start."""

from __future__ import annotations

from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

_spec = util.spec_from_file_location("wan_parallel_bootstrap", ROOT / "bootstrap.py")
_bootstrap = util.module_from_spec(_spec)
_spec.loader.exec_module(_bootstrap)
_bootstrap.load_pack()
