"""What client, launcher and workers tell each other: small JSON messages; tensors stay in an arena.

JSON rather than pickle, because the client knows these classes under another module name than the workers do
(ComfyUI names a pack after its folder), and because nothing that arrives can then run.

Here are the words that frame every request, and how messages are written and read. What can be asked is in requests.py,
what is answered in replies.py, what workers tell of themselves in reports.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .codec import from_json, to_json
from .pool_errors import Failure
from .replies import Replies, Reply
from .requests import AnyRequest, Request
from .silence import Silence, SilenceLimits
from .specs import PoolSettings, RankLocation


@dataclass(frozen=True)
class Start:
    """First message to the launcher.

    Args:
        locations: of all ranks, by rank.
        signs: where the launcher and the ranks show their signs of life (see signs.py).
        limits: how long the launcher waits for a rank without a sign of life.
    """

    settings: PoolSettings
    locations: tuple[RankLocation, ...]
    client_pid: int
    signs: str
    limits: SilenceLimits = field(default_factory=SilenceLimits)


@dataclass(frozen=True)
class Join:
    """First message to a worker: who it is, and how it finds the others.

    Args:
        locations: of all ranks, by rank.
        rendezvous: address at which torch.distributed brings the ranks together, such as file:///path or
            tcp://host:port.
        barrier: address of the cancel barrier (see cancel.py).
        signs: where the rank shows its signs of life (see signs.py).
    """

    rank: int
    settings: PoolSettings
    locations: tuple[RankLocation, ...]
    rendezvous: str
    barrier: str
    signs: str


@dataclass(frozen=True)
class Ready:
    """A worker has joined the group."""

    rank: int
    pid: int
    device: str
    torch: str
    xfuser: str


@dataclass(frozen=True)
class StartFailed:
    """A worker could not join the group."""

    rank: int
    failure: Failure


@dataclass(frozen=True)
class PoolReady:
    """All workers have joined the group."""

    workers: tuple[Ready, ...]


@dataclass(frozen=True)
class PoolFailed:
    """The pool has ended. The failure is for the user where its cause was an error of a worker that is."""

    failure: Failure


@dataclass(frozen=True)
class Cancel:
    """To the launcher: the client no longer waits for request `id`."""

    id: int


Message = AnyRequest | Start | Join | Cancel | Ready | StartFailed | Reply | PoolReady | Replies | PoolFailed | Silence


def encode(message: Message | Request[Any]) -> bytes:
    """A message as JSON.

    Raises:
        ProtocolError: it holds a number that is not finite.
    """
    return to_json(message, Message)


def decode(data: bytes) -> Message:
    """The message that `encode` was given.

    Raises:
        ProtocolError: the data is no message of ours.
    """
    return from_json(data, Message)
