"""The sampling runs of a MODEL whose patches are streamed through pipeline stages (PipeFusion)."""

from __future__ import annotations

from ..approximate.pipefusion_memory_estimate import check_stream, kept_bytes, stream_memory
from ..approximate.schedule import PatchSettings
from .sampling_runs import SampledForward, SamplingRuns, Size, grid_of_size

_SETTINGS = PatchSettings(strategy="pipefusion")


class PipeFusionRuns(SamplingRuns):
    """The sampling runs of one MODEL; `_kept` are bytes on the fullest GPU."""

    def check(self, size: Size, forward: SampledForward) -> None:
        """Refuse a run whose keys and values do not fit, before workers start and weights are read.

        Raises:
            TooLarge: with the figures.
        """
        if not self._why_exact(size, forward):
            self._check(size, forward, self._bytes(size, forward))

    def _settings(self, forward: SampledForward) -> PatchSettings:
        return _SETTINGS

    def _why_exact(self, size: Size, forward: SampledForward) -> str:
        if forward.steps is not None and forward.steps <= _SETTINGS.warmup_steps:
            return "the run has no more steps than the warm-up"
        if not forward.branch_ids:
            return "the branches cannot be told apart"
        if forward.in_context_window:
            return "context windows show the model other frames in every call"
        if forward.two_speakers:
            return "the speakers are told apart by keys of the first frame, which are in other patches"
        return ""

    def _branches(self, forward: SampledForward) -> tuple[str, ...]:
        # a branch that has something else beside the video is another one: keys and values of other sizes are kept
        beside = f"{forward.vace_contexts}:{forward.context_tokens}"
        return tuple(f"{branch}:{beside}" for branch in forward.branch_ids)

    def _keep(self, branches: tuple[str, ...], size: Size, forward: SampledForward) -> int:
        self._kept[branches] = self._bytes(size, forward)
        self._check(size, forward, sum(self._kept.values()))
        return self._kept[branches]

    def _bytes(self, size: Size, forward: SampledForward) -> int:
        """Bytes of the keys and values that the fullest GPU keeps for one forward."""
        settings, tokens = self.pool.settings, _tokens(size, forward)
        return kept_bytes(self.config, settings, self.spec.compute_dtype, tokens, size[0], forward.vace_contexts)

    def _check(self, size: Size, forward: SampledForward, kept: int) -> None:
        settings, tokens = self.pool.settings, _tokens(size, forward)
        if settings.plan.pipeline_parallel > 1:
            check_stream(stream_memory(self.config, settings, self.spec, tokens, kept, self.header), settings)


def _tokens(size: Size, forward: SampledForward) -> int:
    return grid_of_size(size).tokens + forward.context_tokens
