"""The client that users have: a real ComfyUI, with prompts over its API."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
import uuid
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from wan_parallel.wanvideo.base.config import WanConfig

from testkit import tiny
from testkit.campaign import clients, faults
from testkit.campaign.clients import Call, Client
from testkit.campaign.families import MARK
from testkit.campaign.worlds import World
from testkit.comfyui import loras
from testkit.comfyui.comfy_server import ComfyServer, QueueRefused, outcome_of
from testkit.comfyui.distrifusion import patch_model
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, video
from testkit.processes import wait_until_gone
from testkit.vae_reference import native_names, tiny_vae

CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=6)
SIZE = (160, 160, 13)  # width, height, frames: 400 tokens
MODEL, LORA, VAE = "tiny.safetensors", "tiny-lora.safetensors", "narrow.safetensors"
LOOK_SECONDS = 0.05
UNLOAD_SECONDS = 0.5  # in which ComfyUI's prompt thread hears of /free
STOP_SECONDS = 15.0

JOBS = {
    "ulysses": pool_model(),
    "ring": pool_model(ring_degree=2),
    "data": pool_model(data_parallel_size=2),
    "tensor": pool_model(tensor_parallel_size=2),
    "pipeline": pool_model(pipeline_parallel_size=2),
    "lora": {**pool_model("base"), **lora("base", LORA, 0.8, "model")},
    "displaced": patch_model(warmup_steps=1),
    "pipefusion": pool_model(pipeline_parallel_size=2, pipeline_mode="pipefusion"),
    "decode": {},
}


class ComfyUIClient(Client):
    """Drives a ComfyUI.

    Args:
        comfyui: its folder.
        python: its interpreter.
        folder: for its base directory.
        mark: of its processes.
    """

    place = "ComfyUI"
    jobs = tuple(JOBS)

    def __init__(self, comfyui: Path, python: str, folder: Path, mark: str):
        self.comfyui, self.python, self.base = comfyui, python, folder / "base"
        os.environ[MARK] = mark  # of what this process starts; it has no mark itself
        self._server: ComfyServer | None = None
        self._numbers = itertools.count()
        self._prompts: dict[int, str] = {}
        for name in ("diffusion_models", "loras", "vae"):
            (self.base / "models" / name).mkdir(parents=True)
        self.put_file("ulysses", clients.OLD)
        loras.write_lora(self.base / "models" / "loras" / LORA, CONFIG)
        vae = native_names(tiny_vae(dim=4, vae="2.2").state_dict())
        save_file({name: t.half().contiguous() for name, t in vae.items()}, self.base / "models" / "vae" / VAE)

    @property
    def server(self) -> ComfyServer:
        assert self._server is not None
        return self._server

    @property
    def pid(self) -> int:
        return self._server.pid if self._server is not None and self._server.runs else 0

    @property
    def temp(self) -> Path:
        return self.base / "tmp"

    def start(self, kind: str = "") -> None:
        self.stop()
        world = World(kind, self.base)
        world.prepare()
        self._server = ComfyServer(self.comfyui, world.interpreter(self.python), self.base)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None and self._server.runs:
            family = self.family
            self._server.kill()
            wait_until_gone(family.pids, STOP_SECONDS)
        self._server = None

    def begin(self, what: str) -> Call:
        call, name = Call(time.monotonic()), uuid.uuid4().hex
        try:
            if what == faults.UNLOAD:
                self.server.free()
            graph = _status() if what in faults.REQUESTS else _graph(what, next(self._numbers), name)
            self._prompts[id(call)] = self.server.queue(graph)
        except QueueRefused as refusal:
            call.end(clients.FAILED, " ".join(refusal.texts))
        except OSError:
            call.end(clients.LOST)
        else:
            threading.Thread(target=self._watch, args=(self.server, call, name), daemon=True).start()
        return call

    def cancel(self, call: Call) -> None:
        """Press Cancel until it is over, as ComfyUI forgets those that come before the prompt's first node."""
        server = self.server
        while not call.over.is_set():
            with contextlib.suppress(OSError):
                server.interrupt()
            call.over.wait(0.3)

    def unload(self) -> None:
        self.server.free()
        time.sleep(UNLOAD_SECONDS)

    def file_of(self, job: str) -> Path | None:
        return None if job == "decode" else self.base / "models" / "diffusion_models" / MODEL

    def write_file(self, job: str, path: Path, seed: int) -> None:
        tiny.write_checkpoint(path, CONFIG, seed)
        path.chmod(0o644)

    def _watch(self, server: ComfyServer, call: Call, name: str) -> None:
        """Wait for the end of a prompt, and read its result."""
        prompt = self._prompts[id(call)]
        while not call.over.is_set():
            try:
                entry = server.get(f"/history/{prompt}").get(prompt)
            except TimeoutError:
                continue
            except OSError:
                if not server.runs:
                    call.end(clients.LOST)
                continue
            if entry is None:
                time.sleep(LOOK_SECONDS)
                continue
            outcome = outcome_of(entry)
            file, ago = server.base / "output" / f"{name}.safetensors", _seconds_since(entry)
            if outcome.state == "success":
                call.end(clients.DONE, "", _digest(file), ago)
            elif outcome.state == "interrupted":
                call.end(clients.CANCELLED, ago=ago)
            else:
                call.end(clients.FAILED, outcome.message, ago=ago)


def _seconds_since(entry: dict) -> float:
    """Since the end of a prompt in the history, of which ComfyUI tells later: it collects garbage first."""
    ends = [data["timestamp"] / 1000 for _, data in entry["status"]["messages"] if "timestamp" in data]
    return max(0.0, time.time() - max(ends)) if ends else 0.0


def _digest(file: Path) -> str:
    """Of the tensor in a file, which is removed; "" for a prompt that has no result."""
    if not file.exists():
        return ""
    (tensor,) = load_file(file).values()
    file.unlink()
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _status() -> dict:
    return {**pool_model(), "status": node("XDitUSPStatus", model=link("model"))}


def _graph(job: str, number: int, name: str) -> dict:
    """The prompt of a job; `number` keeps ComfyUI from taking an earlier result, `name` is that of the result."""
    if job == "decode":
        config = {key: value for key, value in pool_model().items() if key == "model_config"}
        return {
            **config,
            "vae": node("NarrowWan22VAE", vae_name=VAE, dim=4),
            "random": node("RandomLatent", seed=3, channels=48, frames=7, rows=10, columns=10),
            "latent": node("PassedOn", samples=link("random"), number=number),
            "images": node(
                "WanVideoParallelVAEDecode", samples=link("latent"), vae=link("vae"), workers=link("model_config")
            ),
            "save": node("SaveImageTensor", images=link("images"), name=name),
        }
    empty = video(*SIZE)["latent"]
    sampling = ksampler(cfg=4.0 if job == "data" else 1.0, steps=6 if job in ("displaced", "pipefusion") else 3)
    return {
        **JOBS[job],
        **conditions(),
        "empty": empty,
        "latent": node("PassedOn", samples=link("empty"), number=number),
        **sampling,
        "save": node("SaveLatentTensor", samples=link("sampler"), name=name),
    }
