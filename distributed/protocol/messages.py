"""What client, launcher and workers tell each other: small JSON messages; tensors stay in an arena.

JSON rather than pickle, because the client knows these classes under another module name than the workers do
(ComfyUI names a pack after its folder), and because nothing that arrives can then run.

Here are how messages are written and read, the words that frame every request, and the replies. What can be asked is
in requests.py, what workers tell of themselves in reports.py.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass

from .reports import HeldWeights, Surveyed, WorkerStatus
from .requests import Request
from .specs import PoolSettings


@dataclass(frozen=True)
class Start:
    """First message to the launcher."""

    settings: PoolSettings
    client_pid: int


@dataclass(frozen=True)
class Ready:
    """A worker has joined the group."""

    rank: int
    pid: int
    device: str
    torch: str
    xfuser: str


@dataclass(frozen=True)
class PoolReady:
    workers: tuple[Ready, ...]


@dataclass(frozen=True)
class PoolFailed:
    """The pool has ended."""

    reason: str
    kind: str = ""


@dataclass(frozen=True)
class Cancel:
    """To the launcher: the client no longer waits for request `id`."""

    id: int


@dataclass(frozen=True)
class Exchange:
    """What a forward on stale keys and values exchanged with the other patches.

    Args:
        manager: who did it, with its version.
        received: bytes that arrived on this rank.
        seconds: what the exchange takes when nothing else runs, from one layer measured alone.
        waited: seconds for which this rank's device stood still for it.
        buffers: bytes of the buffers of all branches on this rank.
    """

    manager: str
    received: int
    seconds: float
    waited: float
    buffers: int


@dataclass(frozen=True)
class Stall:
    """How long a rank's device stood still for one kind of exchange in a forward (see timing.py).

    Args:
        kind: of the exchange.
        ranks: that take part in it; none where a rank needs no other.
        microseconds: of each time, in their order, with commas between: as numbers, hundreds of them would take
            milliseconds to read.
    """

    kind: str
    ranks: tuple[int, ...]
    microseconds: str

    @staticmethod
    def of(kind: str, ranks: tuple[int, ...], seconds: Iterable[float]) -> Stall:
        return Stall(kind, ranks, ",".join(str(round(s * 1e6)) for s in seconds))

    @property
    def seconds(self) -> list[float]:
        return [int(us) / 1e6 for us in self.microseconds.split(",") if us]


@dataclass(frozen=True)
class Reply:
    """A worker's answer. `error` is empty where all went well; `kind` is the error's class name; `patches` is
    the uuid of those merged into the model that was to be loaded; `weights` tells of every loaded model; `stalls`
    where the device stood still in a forward."""

    id: int
    rank: int
    error: str = ""
    kind: str = ""
    cancelled: bool = False
    seconds: float = 0.0
    patches: str = ""
    status: WorkerStatus | None = None
    exchange: Exchange | None = None
    weights: tuple[HeldWeights, ...] = ()
    stalls: tuple[Stall, ...] = ()
    surveyed: Surveyed | None = None
    vaes: tuple[str, ...] = ()  # keys of the VAEs it has


@dataclass(frozen=True)
class Replies:
    """Every worker's answer to one request."""

    id: int
    replies: tuple[Reply, ...]


_TYPES = {
    cls.__name__: cls
    for cls in (
        *typing.get_args(Request),
        *(Start, Cancel),
        *(Ready, Reply, PoolReady, Replies, PoolFailed),
    )
}


def encode(message: object) -> bytes:
    """A message as JSON."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}).encode()


def decode(data: bytes) -> object:
    """The message that `encode` was given.

    Raises:
        ValueError: the data is no message of ours.
    """
    fields = json.loads(data)
    cls = _TYPES.get(fields.pop("type", "")) if isinstance(fields, dict) else None
    if cls is None:
        raise ValueError("A pool message has an unknown type. Restart ComfyUI after updating WanParallel.")
    return _revive(cls, fields)


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    """The types of a dataclass's fields. Python evaluates their text anew each time, which took 7 ms of a forward."""
    return typing.get_type_hints(kind)


def _revive(kind: object, value: object) -> object:
    """Build `value`, as JSON holds it, into the annotated type `kind`."""
    if value is None:
        return None
    if is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _revive(hints[name], item) for name, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_revive(arguments[0], item) for item in value)
    if origin is dict:
        return {name: _revive(arguments[1], item) for name, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        return _revive(arguments[0], value)
    return value
