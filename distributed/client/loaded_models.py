"""The models that the workers of a pool hold, as their client knows them: who uses them, what has left the devices, and
the requests that change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..protocol.replies import Replies
from ..protocol.reports import HeldWeights
from ..protocol.requests import ApplyLora, Load, Offload, Unload
from ..protocol.specs import ModelSpec
from ..shm.arena import ReusedArena
from ..weights.lora_transfer import LoraSet, room_for, write_deltas
from .rpc import Poll, WorkerClient


@dataclass(frozen=True)
class _Told:
    """What the workers said last of one model that all of them have, by rank."""

    weights: tuple[HeldWeights, ...]

    def has_merged(self, uuid: str) -> bool:
        """Whether all have merged the LoRAs of `uuid`, and no others."""
        return {held.lora_uuid for held in self.weights} == {uuid}

    def held(self, ranks: Sequence[int]) -> tuple[int, int]:
        """Bytes on the devices of `ranks`: now, and with all back that was offloaded."""
        told = [self.weights[rank] for rank in ranks if rank < len(self.weights)]
        return sum(held.now for held in told), sum(held.whole for held in told)

    @property
    def most_missing(self) -> int:
        """Bytes that are not there, of the device that misses most."""
        return max(held.whole - held.now for held in self.weights)


class LoadedModels:
    """What the workers have loaded, as they said with their last answer.

    One thread at a time, as `WorkerClient`, except for `keep`, `drop`, `held` and `vaes`. What is asked of the workers
    fails as `WorkerClient.ask` does.

    Args:
        arena: in which LoRAs travel.
    """

    def __init__(self, client: WorkerClient, arena: ReusedArena):
        self._client, self._arena = client, arena
        self._told: dict[ModelSpec, _Told] = {}
        self._vaes: frozenset[str] = frozenset()
        self._changing: frozenset[ModelSpec] = frozenset()  # by a request that nobody has answered yet
        self._users: Counter[ModelSpec] = Counter()
        self._dropped: set[ModelSpec] = set()
        self._offloaded: set[ModelSpec] = set()  # offloaded for somebody else's sake, and not back yet

    def hear(self, replies: Replies) -> None:
        """Note what the workers say of themselves with an answer: they have done by then what they were asked."""
        by_spec: dict[ModelSpec, list[HeldWeights]] = {}
        for reply in replies.replies:
            for weights in reply.weights:
                by_spec.setdefault(weights.spec, []).append(weights)
        everywhere = {spec: told for spec, told in by_spec.items() if len(told) == len(replies.replies)}
        self._told = {spec: _Told(tuple(told)) for spec, told in everywhere.items()}
        self._vaes = frozenset.intersection(*(frozenset(reply.vaes) for reply in replies.replies))
        self._changing = frozenset()
        self._offloaded &= self._told.keys()

    def forget(self) -> None:
        """The workers have ended. Who uses what stays as it is."""
        self._told, self._vaes, self._changing = {}, frozenset(), frozenset()
        self._offloaded.clear()

    def keep(self, spec: ModelSpec) -> None:
        """Say that one more user holds this model. Models that were never kept stay until they are unloaded."""
        self._users[spec] += 1
        self._dropped.discard(spec)

    def drop(self, spec: ModelSpec) -> None:
        """Say that a user of this model has gone. After the last one its weights make room for the next model.

        Takes no lock and talks to nobody: it may run in a destructor.
        """
        self._users[spec] -= 1
        if self._users[spec] <= 0:
            self._dropped.add(spec)

    def held(self, spec: ModelSpec, ranks: Sequence[int]) -> tuple[int, int]:
        """Bytes of a model's weights on the devices of `ranks`: now, and with all back that was offloaded.

        As the workers said last; asks nobody.
        """
        told = self._told.get(spec)
        return told.held(ranks) if told is not None and self._client.alive else (0, 0)

    @property
    def vaes(self) -> frozenset[str]:
        """Keys of the VAEs that every worker has, as they said last."""
        return self._vaes if self._client.alive else frozenset()

    @property
    def specs(self) -> set[ModelSpec]:
        """The models that all workers have."""
        return self._told.keys() - self._changing

    def has(self, spec: ModelSpec) -> bool:
        """Whether all workers have a model."""
        return spec in self._told and spec not in self._changing

    @property
    def unused(self) -> set[ModelSpec]:
        """Loaded models whose last user has gone; one that never had any is not among them."""
        return self._dropped & self.specs

    def coming_back(self, spec: ModelSpec) -> int | None:
        """Bytes of weights that come back with the next forward, on the device that takes most; None where none were
        offloaded."""
        return self._told[spec].most_missing if spec in self._offloaded and spec in self._told else None

    def came_back(self, spec: ModelSpec) -> None:
        """A forward has run, and what fits is on the devices again."""
        self._offloaded.discard(spec)

    def unload_unused(self, poll: Poll | None) -> None:
        """Let the workers forget what nobody uses."""
        self._client.wait_for_abandoned(poll)
        self.unload(self.unused, poll)

    def load(self, spec: ModelSpec, tokens: int, poll: Poll | None, sparse: bool = False) -> None:
        """Load a model. `tokens` and `sparse` as in `requests.Load`."""
        self._client.ask(lambda number: Load(number, spec, tokens, sparse), poll)

    def unload(self, specs: Collection[ModelSpec], poll: Poll | None = None) -> None:
        """Let the workers forget these models, which are loaded."""
        if not specs:
            return
        self._changing |= frozenset(specs)
        self._offloaded.difference_update(specs)
        self._client.ask(lambda number: Unload(number, tuple(specs)), poll)

    def apply_lora(self, spec: ModelSpec, loras: LoraSet, poll: Poll | None) -> None:
        """Merge LoRAs into a loaded model, unless they are."""
        if self._told[spec].has_merged(loras.uuid):
            return
        weights = loras.build()
        size = room_for(weights)
        self._client.wait_for_abandoned(poll)
        arena = self._arena.of(size)
        refs = write_deltas(arena, weights)
        self._changing |= {spec}
        self._client.ask(lambda number: ApplyLora(number, spec, loras.uuid, arena.ref, refs), poll)
        self._arena.close()  # LoRAs are larger than latents

    def offload(self, spec: ModelSpec, ranks: Sequence[int], nbytes: float, poll: Poll | None) -> int:
        """Move weights of a loaded model to host memory (see `Pool.offload`); returns the bytes that left."""
        self._client.wait_for_abandoned(poll)
        before, _ = self.held(spec, ranks)
        self._offloaded.add(spec)  # before it has: the workers go on with it where poll gives it up
        self._client.ask(lambda number: Offload(number, spec, tuple(ranks), nbytes), poll)
        return before - self.held(spec, ranks)[0]
