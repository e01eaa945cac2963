"""The models that the workers of a pool hold, as their client knows them: who uses them, what has left the devices, and
the requests that change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from ..protocol.requests import Load, Patch, StepOut, Unload
from ..protocol.specs import ModelSpec
from ..shm.arena import ReusedArena
from ..weights.lora_transfer import PatchSet, room_for, write_patches
from .rpc import Conversation, Poll

_MIXED = "mixed"  # no set has this uuid: one rank failed to merge what the others have, so all merge anew


class Holdings:
    """What a client has asked its workers to hold, until they end.

    As of a conversation: one thread at a time, `keep`, `drop` and `held` excepted. What is asked of the workers fails
    as `Conversation.ask` does.

    Args:
        arena: in which patches travel.
    """

    def __init__(self, conversation: Conversation, arena: ReusedArena):
        self._conversation, self._arena = conversation, arena
        self.loaded: dict[ModelSpec, str] = {}  # to the uuid of the patches merged
        self._users: Counter[ModelSpec] = Counter()
        self._dropped: set[ModelSpec] = set()
        self._aside: set[ModelSpec] = set()  # stepped out for somebody else's sake, and not back yet

    def forget(self) -> None:
        """The workers have ended. Who uses what stays as it is."""
        self.loaded.clear()
        self._aside.clear()

    def keep(self, spec: ModelSpec) -> None:
        """See `Pool.keep`."""
        self._users[spec] += 1
        self._dropped.discard(spec)

    def drop(self, spec: ModelSpec) -> None:
        """See `Pool.drop`. Takes no lock and talks to nobody: it may run in a destructor."""
        self._users[spec] -= 1
        if self._users[spec] <= 0:
            self._dropped.add(spec)

    @property
    def unused(self) -> set[ModelSpec]:
        """Loaded models whose last user has gone; one that never had any is not among them."""
        return self._dropped & self.loaded.keys()

    def held(self, spec: ModelSpec, ranks: Sequence[int]) -> tuple[int, int]:
        """See `Pool.held`."""
        weights = self._conversation.told.weights.get(spec, ()) if self._conversation.alive else ()
        told = [weights[rank] for rank in ranks if rank < len(weights)]
        return sum(w.now for w in told), sum(w.whole for w in told)

    def coming_back(self, spec: ModelSpec) -> int | None:
        """Bytes of weights that come back with the next forward, on the device that takes most; None where none have
        stepped out."""
        if spec not in self._aside:
            return None
        return max(weights.whole - weights.now for weights in self._conversation.told.weights[spec])

    def came_back(self, spec: ModelSpec) -> None:
        """A forward has run, and what fits is on the devices again."""
        self._aside.discard(spec)

    def make_way(self, poll: Poll | None) -> None:
        """Let the workers forget what nobody uses."""
        self._conversation.drain(poll)
        self.unload(self.unused, poll)

    def load(self, spec: ModelSpec, tokens: int, poll: Poll | None) -> None:
        """Load a model. `tokens` as in `requests.Load`."""
        replies = self._conversation.ask(lambda number: Load(number, spec, tokens), poll)
        merged = {held.patches for reply in replies for held in reply.weights if held.spec == spec}
        self.loaded[spec] = merged.pop() if len(merged) == 1 else _MIXED

    def unload(self, specs: Collection[ModelSpec], poll: Poll | None = None) -> None:
        """Let the workers forget these models, which are loaded."""
        if not specs:
            return
        for spec in specs:
            del self.loaded[spec]
            self._aside.discard(spec)
        self._conversation.ask(lambda number: Unload(number, tuple(specs)), poll)

    def patch(self, spec: ModelSpec, patches: PatchSet, poll: Poll | None) -> None:
        """Merge LoRAs into a loaded model, unless they are."""
        if self.loaded[spec] == patches.uuid:
            return
        weights = patches.build()
        size = room_for(weights)
        self._conversation.drain(poll)
        arena = self._arena.of(size)
        refs = write_patches(arena, weights)
        del self.loaded[spec]  # if this is interrupted or fails, the next Load tells what the workers have
        self._conversation.ask(lambda number: Patch(number, spec, patches.uuid, arena.ref, refs), poll)
        self.loaded[spec] = patches.uuid
        self._arena.close()  # LoRAs are larger than latents

    def step_out(self, spec: ModelSpec, ranks: Sequence[int], nbytes: float, poll: Poll | None) -> int:
        """See `Pool.step_out`; the model is loaded."""
        self._conversation.drain(poll)
        before, _ = self.held(spec, ranks)
        self._aside.add(spec)  # before it has: the workers go on with it where poll gives it up
        self._conversation.ask(lambda number: StepOut(number, spec, tuple(ranks), nbytes), poll)
        return before - self.held(spec, ranks)[0]
