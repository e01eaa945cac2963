"""Import this pack under the fixed name `wan_parallel`.

The pack's folder may have any name (often one that is no Python identifier), and `nodes` or `distributed` on
`sys.path` would clash with other modules. Workers, scripts and tests load it through here; ComfyUI loads it
in its own way. As a program it runs one module's `main` with the remaining arguments:

    python bootstrap.py distributed.executors.launcher 3
"""

from __future__ import annotations

import sys
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

PACKAGE = "wan_parallel"
ROOT = Path(__file__).resolve().parent


def load_pack() -> ModuleType:
    """Register the folder of this file as the package `wan_parallel` and return it; safe to call twice."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} is not a whole WanParallel folder. Install the pack again.")
    module = util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__mp_main__":  # a process that multiprocessing spawned from such a program
    load_pack()
elif __name__ == "__main__":
    if sys.path[0] == str(ROOT):  # Python puts a script's folder first; its `nodes` must not shadow anything
        del sys.path[0]
    load_pack()
    sys.exit(import_module(f"{PACKAGE}.{sys.argv[1]}").main(*sys.argv[2:]))
