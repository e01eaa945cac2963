"""The formats of weights in files. Each module defines the formats of one family, and importing this package imports
every module, so that a new format is one new module.

May import format.py and quantized.py of quant/, base/ and ops/. Open registry.py first.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
