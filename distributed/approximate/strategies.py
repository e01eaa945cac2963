"""All approximate strategies: to import this module registers them (see parallel/strategy.py)."""

from . import displaced, pipefusion

__all__ = ["displaced", "pipefusion"]
