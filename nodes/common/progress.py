"""Text under a running node while it waits for workers: what they load, and which of them show no sign of life."""

from __future__ import annotations

import time
from types import TracebackType

import comfy.model_management
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...distributed.client.pool import Pool
from ...distributed.protocol.specs import ModelSpec

_REPEAT_SECONDS = 1.0


class WorkersPoll:
    """Called again and again while a node waits for workers: raises at Cancel, and says under the node which workers
    show no sign of life."""

    def __init__(self, pool: Pool):
        self._pool, self._shown, self._repeat = pool, False, 0.0

    def __call__(self) -> None:
        """Poll once.

        Raises:
            InterruptProcessingException: Cancel was pressed.
        """
        text, now = self._pool.silence.text, time.monotonic()
        if text and now >= self._repeat:
            self._shown, self._repeat = True, now + _REPEAT_SECONDS
            _send(text)
        elif self._shown and not text:
            self._shown = False
            _send("All workers show signs of life again.")
        comfy.model_management.throw_exception_if_processing_interrupted()


class LoadingText:
    """Says which model is being loaded once `show` is called, and at the end how long that took; else nothing."""

    def __init__(self, spec: ModelSpec, pool: Pool):
        self._name, self._workers = spec.name, pool.settings.plan.num_gpus
        self._starting = not pool.alive
        self._shown = False

    def __enter__(self) -> LoadingText:
        self._begin = time.monotonic()
        return self

    def show(self) -> None:
        """Show the text; called again and again while the workers are not ready."""
        if not self._shown:
            self._shown = True
            doing = "Starting workers and loading" if self._starting else "Loading"
            _send(f"{doing}: {self._name} on {self._workers}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown and kind is None:
            seconds = time.monotonic() - self._begin
            _send(f"{self._name} is on {self._workers} workers ({seconds:.0f} s)")


def _send(text: str) -> None:
    """Put `text` under the running node; nowhere if no node is running."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)
