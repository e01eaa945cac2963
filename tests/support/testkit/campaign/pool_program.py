"""A process that uses pools, as ComfyUI does, and does what it reads from stdin; faults happen to it and its workers.

    python -m testkit.campaign.pool_program MODEL

A line of stdin is a command in JSON: its id, and what to `do`: run (a job), unload, trim, status, close, or cancel the
command `of` another id. A line of stdout is a command's news: began, a step, or how it ended; the first one
says that the program is up.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from wan_parallel.distributed.client.pool import Pool, acquire

from testkit.campaign.jobs import JOBS, do


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


class PoolProgram:
    """Does each command in a thread of its own, as ComfyUI has threads for prompts and for requests."""

    def __init__(self, model: Path):
        self.model = model
        self.pool: Pool | None = None
        self._given_up: dict[int, threading.Event] = {}
        self._writing = threading.Lock()

    def serve(self) -> None:
        self._say(0, "up")
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "cancel":
                self._given_up[command["of"]].set()
                continue
            self._given_up[command["id"]] = threading.Event()
            threading.Thread(target=self._obey, args=(command,), daemon=True).start()

    def _obey(self, command: dict[str, Any]) -> None:
        number, given_up = command["id"], self._given_up[command["id"]]

        def poll() -> None:
            if given_up.is_set():
                raise Interrupted

        self._say(number, "began")
        try:
            digest = self._perform(command, poll)
        except Interrupted:
            self._say(number, "cancelled")
        except Exception as error:  # whatever it is, the campaign judges it
            self._say(number, "failed", error=type(error).__name__, text=str(error))
        else:
            self._say(number, "done", digest=digest)

    def _perform(self, command: dict[str, Any], poll: Any) -> str:
        if command["do"] == "run":
            job = JOBS[command["job"]]
            self.pool = pool = acquire(job.settings)
            result = do(job, pool, self.model, poll, lambda index: self._say(command["id"], "step", index=index))
            return hashlib.sha256(result.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        if self.pool is not None:
            getattr(self.pool, command["do"])(poll=poll)
        return ""

    def _say(self, number: int, news: str, **more: object) -> None:
        with self._writing:
            print(json.dumps({"id": number, "news": news, **more}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PoolProgram(Path(sys.argv[1])).serve()
