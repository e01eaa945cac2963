"""The base class of errors whose text is written for a user. Imports nothing, so that every process can read it."""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """An error whose text says in one sentence what is wrong and in another what to do.

    Subclasses are registered by their name, under which an error of a worker arrives in ComfyUI's process as an object
    of the same class. Their constructors take the text alone.
    """

    _classes: ClassVar[dict[str, type[UserError]]] = {}

    def __init_subclass__(cls) -> None:
        """Register the subclass.

        Raises:
            TypeError: another module has a subclass of this name.
        """
        super().__init_subclass__()
        known = UserError._classes.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{known.__module__} has a UserError named {cls.__name__} too. Rename one of them.")
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
