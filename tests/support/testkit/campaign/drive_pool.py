"""The client that uses pools directly: `pool_program` in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import testkit
from testkit.campaign import clients, faults
from testkit.campaign.clients import Call, Client
from testkit.campaign.families import MARK
from testkit.campaign.jobs import JOBS, write_model
from testkit.campaign.worlds import World
from testkit.processes import wait_until_gone


class PoolClient(Client):
    """Drives `pool_program`.

    Args:
        folder: for its files.
        mark: of its processes.
    """

    place = "pool"
    jobs = tuple(JOBS)

    def __init__(self, folder: Path, mark: str):
        self.folder, self.mark = folder, mark
        (folder / "models").mkdir(parents=True, exist_ok=True)
        self.model = folder / "models" / "tiny.safetensors"
        self.log = folder / "log"
        write_model(self.model, clients.OLD)
        self._process: subprocess.Popen[str] | None = None
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count(1)

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    @property
    def temp(self) -> Path:
        return self.folder / "world" / "tmp"

    def start(self, kind: str = "") -> None:
        self.stop()
        world = World(kind, self.folder / "world")
        world.prepare()
        command = [
            *world.prefix(sys.executable),
            sys.executable,
            "-m",
            "testkit.campaign.pool_program",
            str(self.model),
        ]
        path = str(testkit.ROOT / "tests" / "support")
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.folder,
                env={**os.environ, **world.environment, MARK: self.mark, "PYTHONPATH": path},
            )
        if not self._process.stdout.readline():
            raise RuntimeError(f"The client has not come up: {self.log.read_text()[-2000:]}")
        self._calls = {}
        threading.Thread(target=_listen, args=(self._process, self._calls), daemon=True).start()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        family = clients.family_of(process.pid)
        process.kill()
        process.wait()
        wait_until_gone(family.pids, 5)

    def begin(self, what: str) -> Call:
        number = next(self._numbers)
        call = self._calls[number] = Call(time.monotonic())
        command = {"id": number, "do": what if what in faults.REQUESTS else "run", "job": what}
        self._send(command, call)
        return call

    def cancel(self, call: Call) -> None:
        number = next(number for number, known in self._calls.items() if known is call)
        self._send({"do": "cancel", "of": number}, call)

    def unload(self) -> None:
        self.run(faults.UNLOAD, clients.WAIT_SECONDS)

    def file_of(self, job: str) -> Path | None:
        return None if JOBS[job].vae else self.model

    def write_file(self, job: str, path: Path, seed: int) -> None:
        write_model(path, seed)

    def _send(self, command: dict, call: Call) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError:
            call.end(clients.LOST)


def _listen(process: subprocess.Popen[str], calls: dict[int, Call]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # closed, or cut in the middle of a line
        for line in process.stdout:
            news = json.loads(line)
            call = calls[news["id"]]
            if news["news"] == "began":
                call.began = time.monotonic()
            elif news["news"] == "step":
                call.steps.append(time.monotonic())
            else:
                call.end(news["news"], news.get("text", ""), news.get("digest", ""))
    for call in [*calls.values()]:
        if not call.over.is_set():
            call.end(clients.LOST)
