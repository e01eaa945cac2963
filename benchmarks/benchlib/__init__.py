"""What the benchmark programs share; importing it registers the pack as `wan_parallel`."""

from __future__ import annotations

from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_spec = util.spec_from_file_location("wan_parallel_bootstrap", ROOT / "bootstrap.py")
_bootstrap = util.module_from_spec(_spec)
_spec.loader.exec_module(_bootstrap)
_bootstrap.load_pack()
