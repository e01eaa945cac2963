"""How frozen dataclasses become JSON and come back, checked field by field: what arrives has the types that it should.

The types of fields may be str, int, bool, float (finite), tuple[X, ...], dict[str, X], other dataclasses, X | None, and
unions of dataclasses. A member of such a union travels with the name of its class as its "type".
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from ...wanvideo.base.user_error import UserError

_TAG = "type"


class ProtocolError(UserError, ValueError):
    """What has arrived is no message of this version of the pack. The text says where it differs, and what to do."""


@dataclass(frozen=True)
class _Codec:
    """How values of one type are written and read.

    Args:
        encode: gives what JSON can hold.
        decode: gives the value back, from what JSON holds and from the name of its field, for errors.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any, str], Any]


def _wrong(what: str) -> ProtocolError:
    return ProtocolError(f"{what}. Restart ComfyUI after updating WanParallel.")


def to_json(value: object, kind: object) -> bytes:
    """A value of the annotated type `kind` as JSON.

    Raises:
        ProtocolError: it holds a number that is not finite.
    """
    try:
        return json.dumps(_codec(kind).encode(value), allow_nan=False).encode()
    except ValueError as error:
        raise _wrong(f"A pool message cannot be written: {error}") from None


def from_json(data: bytes, kind: object) -> Any:
    """The value that `to_json` was given.

    Raises:
        ProtocolError: the data is no JSON, or holds something else than a value of `kind`.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"A pool message is no JSON ({type(error).__name__})") from None
    return _codec(kind).decode(value, "A pool message")


@functools.cache
def _codec(kind: Any) -> _Codec:
    """The codec of a type, made once: Python evaluates the text of annotations anew each time, 7 ms of a forward."""
    if kind in _PLAIN:
        return _Codec(lambda value: value, _PLAIN[kind])
    if is_dataclass(kind):
        return _of_dataclass(typing.cast(type, kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _of_tuple(_codec(arguments[0]))
    if origin is dict and arguments[0] is str:
        return _of_dict(_codec(arguments[1]))
    if origin in (types.UnionType, typing.Union):
        return _of_union(arguments)
    raise TypeError(f"Messages cannot hold values of {kind}.")


def _str(value: object, where: str) -> str:
    if type(value) is not str:
        raise _wrong(f"{where} is not a text")
    return value


def _bool(value: object, where: str) -> bool:
    if type(value) is not bool:
        raise _wrong(f"{where} is neither true nor false")
    return value


def _int(value: object, where: str) -> int:
    if type(value) is not int:
        raise _wrong(f"{where} is not a whole number")
    return value


def _float(value: object, where: str) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]  # checked here
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(f"{where} is not a finite number")
    return number


_PLAIN: dict[object, Callable[[object, str], object]] = {str: _str, bool: _bool, int: _int, float: _float}


def _of_tuple(item: _Codec) -> _Codec:
    def decode(value: object, where: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _wrong(f"{where} is not a list")
        return tuple(item.decode(each, where) for each in value)

    return _Codec(lambda value: [item.encode(each) for each in value], decode)


def _of_dict(item: _Codec) -> _Codec:
    def decode(value: object, where: str) -> dict[str, Any]:
        named = _mapping(value, where)
        return {name: item.decode(each, f"{where}[{name}]") for name, each in named.items()}

    return _Codec(lambda value: {name: item.encode(each) for name, each in value.items()}, decode)


def _of_dataclass(cls: type[Any]) -> _Codec:
    hints = typing.get_type_hints(cls)
    codecs = {field.name: _codec(hints[field.name]) for field in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}

    def encode(value: Any) -> dict[str, Any]:
        return {name: codec.encode(getattr(value, name)) for name, codec in codecs.items()}

    def decode(value: object, where: str) -> Any:
        given = _mapping(value, where)
        if not needed <= given.keys() <= codecs.keys():
            wrong = sorted((needed - given.keys()) | (given.keys() - codecs.keys()))
            raise _wrong(f"{where} has not the fields of {cls.__name__}: {', '.join(wrong)}")
        return cls(**{name: codecs[name].decode(item, f"{cls.__name__}.{name}") for name, item in given.items()})

    return _Codec(encode, decode)


def _of_union(arms: tuple[Any, ...]) -> _Codec:
    """A dataclass of several, by its name, or a value that may be None."""
    present = [arm for arm in arms if arm is not type(None)]
    one = _codec(present[0]) if len(present) == 1 else _of_tagged(present)
    if len(present) == len(arms):
        return one
    return _Codec(
        lambda value: None if value is None else one.encode(value),
        lambda value, where: None if value is None else one.decode(value, where),
    )


def _of_tagged(classes: list[type[Any]]) -> _Codec:
    by_name = {cls.__name__: _of_dataclass(cls) for cls in classes}

    def encode(value: Any) -> dict[str, Any]:
        name = type(value).__name__
        return {_TAG: name, **by_name[name].encode(value)}

    def decode(value: object, where: str) -> Any:
        given = dict(_mapping(value, where))
        name = given.pop(_TAG, "")
        if not isinstance(name, str) or name not in by_name:
            raise _wrong(f"{where} has an unknown type")
        return by_name[name].decode(given, where)

    return _Codec(encode, decode)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if type(value) is not dict:
        raise _wrong(f"{where} has no fields")
    return value
