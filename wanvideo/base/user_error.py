"""The base class of errors whose text is written for a user. Imports no torch, so that every process can read it."""

from __future__ import annotations

import json
from typing import ClassVar

SHOWN_MODULE = "WanParallel"
"""The module of all errors for a user, as ComfyUI and tracebacks show it in front of the class."""
_LONGEST = 60  # characters of a value in a sentence
_WIDEST = 100  # bits of a whole number in a sentence


def shown(value: object) -> str:
    """Write a value for a sentence, however long or strange it is: on one line, in characters that print."""
    if isinstance(value, str):
        cut = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
        return f'"{cut}"' if cut.isprintable() else json.dumps(cut)
    if isinstance(value, int) and value.bit_length() > _WIDEST:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    return f"a value of type {type(value).__name__}"


class UserError(Exception):
    """An error whose text says in one sentence what is wrong and in another what to do.

    Subclasses are registered by their name, under which an error of a worker arrives in ComfyUI's process as an object
    of the same class. Their constructors take the text alone.

    ComfyUI shows an error's class with its module, which for this pack is a path. The module of a subclass is therefore
    called `SHOWN_MODULE`, and a user reads "WanParallel.PlanError: ...". No such module exists, so errors cannot be
    pickled: they travel as `distributed.protocol.pool_errors.Failure`.
    """

    _classes: ClassVar[dict[str, type[UserError]]] = {}
    _defined_in: ClassVar[str] = __name__

    def __init_subclass__(cls) -> None:
        """Register the subclass.

        Raises:
            TypeError: another module has a subclass of this name.
        """
        super().__init_subclass__()
        cls._defined_in = cls.__module__
        cls.__module__ = SHOWN_MODULE
        known = UserError._classes.setdefault(cls.__name__, cls)
        if (known._defined_in, known.__qualname__) != (cls._defined_in, cls.__qualname__):
            raise TypeError(f"{known._defined_in} has a UserError named {cls.__name__} too. Rename one of them.")
        UserError._classes[cls.__name__] = cls

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """The names of this class and of its bases below `UserError`, the nearest first."""
        bases = (base for base in cls.__mro__ if issubclass(base, UserError) and base is not UserError)
        return tuple(base.__name__ for base in bases)

    @staticmethod
    def known(kinds: tuple[str, ...]) -> type[UserError] | None:
        """The first of the named classes that this process has imported; None if it has none of them."""
        return next((UserError._classes[kind] for kind in kinds if kind in UserError._classes), None)


class InputError(UserError, ValueError):
    """An input of a node or of a forward has a wrong value, type or shape. The text names the input."""
