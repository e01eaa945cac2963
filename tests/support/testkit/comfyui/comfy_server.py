"""A headless ComfyUI for the tests: its own base folder, this pack linked in, driven over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import testkit
from safetensors.torch import load_file

ROOT = testkit.ROOT
HELPER_NODES = {
    "wan_test_helpers.py": Path(__file__).with_name("helper_nodes.py"),
    "wan_test_others.py": Path(__file__).parent / "inside" / "nodes_of_others.py",
}
START_SECONDS = 120
PROMPT_SECONDS = 120


class QueueRefused(Exception):
    """POST /prompt was answered with an error; `texts` holds what the user reads."""

    def __init__(self, status: int, body: dict):
        self.status = status
        errors = [body.get("error", {})]
        errors += [error for node in body.get("node_errors", {}).values() for error in node["errors"]]
        self.texts = [f"{error.get('message', '')} {error.get('details', '')}" for error in errors]
        super().__init__(f"{status}: {self.texts}")


@dataclass
class Outcome:
    """How a prompt ended: `success`, `error` or `interrupted`, with the error's text and node."""

    state: str
    message: str
    node_type: str
    outputs: dict = field(default_factory=dict)
    seconds: float = 0.0


class ComfyServer:
    """One ComfyUI process. `base` holds its models, output and custom_nodes; the ComfyUI folder is untouched."""

    def __init__(self, comfyui: Path, python: str, base: Path, options: tuple[str, ...] = ()):
        self.comfyui, self.python, self.base, self.options = comfyui, python, base, options
        self.port = _free_port()
        self.log_path = base / "comfyui.log"
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def start(self) -> None:
        custom_nodes = self.base / "custom_nodes"
        custom_nodes.mkdir(parents=True, exist_ok=True)
        for link, target in (("My-Wan-Pack", ROOT), *HELPER_NODES.items()):
            if not (custom_nodes / link).is_symlink():
                (custom_nodes / link).symlink_to(target)
        (self.base / "output").mkdir(exist_ok=True)
        temp = self.base / "tmp"
        temp.mkdir(exist_ok=True)
        command = [self.python, "-s", "main.py", "--cpu", "--port", str(self.port), "--disable-auto-launch"]
        command += ["--base-directory", str(self.base), *self.options]
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                env={**os.environ, "TMPDIR": str(temp)},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self._process.returncode}:\n{self.log[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not come up in {START_SECONDS} s:\n{self.log[-4000:]}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server as Ctrl-C does, or by another signal, and by force if that takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait(10)

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.loads(answer.read() or b"{}")

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def post(self, path: str, data: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")

    def queue(self, graph: dict) -> str:
        """POST /prompt; the prompt's id. Raises QueueRefused."""
        try:
            return self.post("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise QueueRefused(error.code, json.loads(error.read())) from None

    def wait(self, prompt_id: str, seconds: float = PROMPT_SECONDS) -> Outcome:
        """Wait until the prompt is in the history."""
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return outcome_of(entry, time.monotonic() - begin)
            time.sleep(0.02)
        raise TimeoutError(f"The prompt did not end in {seconds} s:\n{self.log[-3000:]}")

    def run(self, graph: dict, seconds: float = PROMPT_SECONDS) -> Outcome:
        return self.wait(self.queue(graph), seconds)

    def sample(self, graph: dict, latent: list, seconds: float = PROMPT_SECONDS):
        """Run `graph` up to the output `latent` ([node, slot]) and return its samples."""
        name = uuid.uuid4().hex
        save = {"class_type": "SaveLatentTensor", "inputs": {"samples": latent, "name": name}}
        outcome = self.run({**graph, "save": save}, seconds)
        assert outcome.state == "success", f"{outcome.node_type}: {outcome.message}\n{self.log[-3000:]}"
        return load_file(self.base / "output" / f"{name}.safetensors")["samples"]

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        self.post("/free", {"unload_models": True, "free_memory": True})


def outcome_of(entry: dict, seconds: float = 0.0) -> Outcome:
    """How a prompt in ComfyUI's history has ended."""
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            return Outcome("error", data["exception_message"], data["node_type"], entry["outputs"], seconds)
        if event == "execution_interrupted":
            return Outcome("interrupted", "", data["node_type"], entry["outputs"], seconds)
    return Outcome(entry["status"]["status_str"], "", "", entry["outputs"], seconds)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
