"""The approximate strategies: each module defines one, and importing this package imports all of them, so that a new
strategy is one new module.

May import whatever approximate/ may, and its other modules. Open pipefusion.py first, the shorter one.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
