"""Ten prompts in a row through a two-expert Wan 2.2 A14B graph whose text encoder and VAE share a GPU with a worker.

    COMFYUI_DIR=... python3 benchmarks/prompts.py --memory-gib 24 --folder /tmp --out benchmarks/results/prompts.jsonl

Runs in ComfyUI's Python. It writes files of random numbers in the released formats (two experts, UMT5-XXL, Wan 2.1's
VAE; 35 GB in fp8_scaled) and runs ComfyUI's stock nodes on them (CLIPTextEncode, two KSamplerAdvanced of two steps
each, VAEDecode), with nothing of ours but the config and the loaders, in one ComfyUI process and one pool. The exit
status is 1 if a prompt failed, if its frames were no numbers, or if a file was read again after the first prompt.

--memory-gib makes a smaller card of the one that is there: another process (ballast.py) holds the rest of it, so that
ComfyUI, the worker and CUDA's own memory of both share what is left; gpu_memory_fraction is 0.9 of that. ComfyUI still
sees the whole card's size in its device's properties, by which it only chooses reserves.

What is read is counted in three ways, by process: fetched from storage (read_bytes in /proc/PID/io; the files are
dropped from the page cache before each prompt but the first, and with --cold before that too), read by system calls
(rchar), and touched in mapped files (Referenced in smaps, set back before each prompt). The first would miss pages that
a mapping keeps in the cache; the last has them. On the CPU a worker computes with the pages of the mapped file: there
the last does not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

from benchlib.prompt_files import DTYPES, ModelFiles, TextDims, write_files
from benchlib.rows import Line, installed_versions, publish
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig

log = logging.getLogger("prompts")

HERE = Path(__file__).resolve().parent
GIB = 2**30
FRACTION = 0.9  # of the card, for a worker: the node's default
NEGATIVE = "blurred, distorted, text, watermark"
SUBJECTS = ("a red fox", "an old sailor", "two dancers", "a steam engine", "a paper boat")
PLACES = ("over fresh snow", "in heavy rain at night")
TINY = WanConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=4), TextDims(1, 2, 128, 256)


@dataclass(frozen=True)
class PromptRow(Line):
    """One prompt of the row, on ComfyUI's side and the workers'.

    s: seconds of the whole prompt. comfyui_gib: the most that torch's allocator gave out in ComfyUI's process during
    it, worker_gib: in a worker, since that started (worker_reserved_gib: took from its GPU for that). device_gib: the
    most of ComfyUI's GPU that was in use by all processes together, ballast not counted. in_gib, out_gib: weights that
    the workers copied from host memory to their GPUs and back during the prompt; host_gib: of host memory that they
    hold. disk_gib, calls_gib: fetched from storage and read by system calls since the start, by the workers (w) and by
    ComfyUI (c); None where the system does not count it. again_gib: of the model files, read or touched again during
    this prompt in any of the three ways; None for the first.
    """

    prompt: int
    ok: bool
    s: float
    dtype: str
    text_dtype: str
    blocks: int
    res: str
    gpus: int
    steps: int
    cfg: float
    gpu: str
    versions: dict[str, str]
    date: str
    what: str = "prompts"
    memory_gib: float | None = None
    error: str | None = None
    finite: bool | None = None
    comfyui_gib: float | None = None
    worker_gib: float | None = None
    worker_reserved_gib: float | None = None
    device_gib: float | None = None
    in_gib: float | None = None
    out_gib: float | None = None
    host_gib: float | None = None
    disk_w_gib: float | None = None
    disk_c_gib: float | None = None
    calls_w_gib: float | None = None
    calls_c_gib: float | None = None
    again_gib: float | None = None
    placement: str | None = None


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    config, text = TINY if options.tiny else (PRESETS["14b"], TextDims())
    if options.blocks:
        config = replace(config, num_layers=options.blocks)
    with ExitStack() as stack:
        folder = options.folder
        if not options.keep:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-parallel-", dir=folder)))
        log.info("Writing the files into %s.", folder)
        files = write_files(folder, config, text, options.dtype, options.text_dtype)
        log.info("%.1f GiB are there.", sum(path.stat().st_size for path in files.all) / GIB)
        total = stack.enter_context(ballast(options.memory_gib, options.gpus)) if options.memory_gib else None
        return _run(stack, options, config, files, folder, text, total)


def _run(
    stack: ExitStack,
    options: argparse.Namespace,
    config: WanConfig,
    files: ModelFiles,
    folder: Path,
    text: TextDims,
    total: int | None,
) -> int:
    fraction = FRACTION if total is None else FRACTION * options.memory_gib * GIB / total
    dims = asdict(text) if options.tiny else None
    comfyui = stack.enter_context(comfyui_process(options, {"models": str(folder), "text": dims}))
    row = PromptRow(
        prompt=0,
        ok=False,
        s=0,
        dtype=options.dtype,
        text_dtype=options.text_dtype,
        blocks=config.num_layers,
        res=options.res,
        gpus=options.gpus,
        steps=options.steps,
        cfg=options.cfg,
        gpu="CPU",
        versions=installed_versions(),
        date=date.today().isoformat(),
        memory_gib=options.memory_gib,
    )
    reads, moved, good = Reads(files, comfyui.pid, counts_touches=not options.cpu), (0, 0), True
    for number, prompt in enumerate(prompts(options.prompts)):
        before = reads.begin(drop=number > 0 or options.cold)
        answer = comfyui.ask(f"prompt-{number}", graph(files, prompt, fraction, options))
        reads.workers = tuple(worker["pid"] for worker in answer["workers"])
        again = reads.again(before) if number else None
        now = _filled(replace(row, prompt=number), answer, moved, total)
        now = replace(now, **reads.since_start(), again_gib=None if again is None else _gib(again))
        let_through = min(64 * 2**20, min(path.stat().st_size for path in files.experts) // 2)
        now = replace(now, ok=bool(not now.error and now.finite and (again or 0) <= let_through))
        if number and again is None:
            log.warning("This system does not tell what a process reads, so nothing is known of reading again.")
            now = replace(now, ok=False)
        moved = tuple(sum(worker[name] for worker in answer["workers"]) for name in ("moved_in", "moved_out"))
        publish(now, options.out)
        good &= now.ok
        if now.error:
            break
    return 0 if good else 1


def _filled(row: PromptRow, answer: Mapping, moved: tuple[int, int], total: int | None) -> PromptRow:
    """What ComfyUI's process says of a prompt; `moved`: bytes in and out before it."""
    workers, cuda = answer["workers"], "device_bytes" in answer
    row = replace(row, s=round(answer["s"], 2), error=answer["error"], finite=answer.get("finite"))
    if workers:
        row = replace(
            row,
            in_gib=_gib(sum(worker["moved_in"] for worker in workers) - moved[0]),
            out_gib=_gib(sum(worker["moved_out"] for worker in workers) - moved[1]),
            host_gib=_gib(sum(worker["host_bytes"] for worker in workers)),
            placement="; ".join(workers[0]["placements"]),
        )
    if not cuda:
        return row
    held = total - int(row.memory_gib * GIB) if total else 0
    return replace(
        row,
        gpu=answer["gpu"],
        comfyui_gib=_gib(answer["peak_allocated"]),
        worker_gib=_gib(max((worker["peak_allocated"] for worker in workers), default=0)),
        worker_reserved_gib=_gib(max((worker["peak_reserved"] for worker in workers), default=0)),
        device_gib=_gib(answer["device_bytes"] - held),
    )


def prompts(count: int) -> Iterator[str]:
    """As many different texts."""
    for index in range(count):
        subject, place = SUBJECTS[index % len(SUBJECTS)], PLACES[index // len(SUBJECTS) % len(PLACES)]
        yield f"{subject} {place}, take {index + 1}, the camera moves slowly"


def graph(files: ModelFiles, prompt: str, fraction: float, options: argparse.Namespace) -> dict:
    """The two-stage graph in ComfyUI's API format, as the template for Wan 2.2 A14B has it."""
    width, height, frames = (int(size) for size in options.res.split("x"))
    half, device = options.steps // 2, "cpu" if options.cpu else "cuda"
    config = {**CONFIG, "num_gpus": options.gpus, "gpu_memory_fraction": fraction, "device": device}
    config["use_bf16"] = not options.cpu  # some CPUs have no fast bf16
    precision = "fp32" if options.cpu else "bf16"
    nodes = {"config": _node("XDitUSPConfig", **config)}
    for name, path in zip(("high", "low"), files.experts, strict=True):
        nodes[f"{name} file"] = _node(
            "XDitUSPWanVideoModelLoader", model=path.name, base_precision=precision, xdit_usp_config=["config", 0]
        )
        nodes[name] = _node("ModelSamplingSD3", model=[f"{name} file", 0], shift=8.0)
    shared = {
        "noise_seed": 1,
        "steps": options.steps,
        "cfg": options.cfg,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": ["positive", 0],
        "negative": ["negative", 0],
    }
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": half, "return_with_leftover_noise": "enable"}
    last = {"add_noise": "disable", "start_at_step": half, "end_at_step": 999, "return_with_leftover_noise": "disable"}
    return nodes | {
        "clip": _node("CLIPLoader", clip_name=files.text.name, type="wan", device="default"),
        "positive": _node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "negative": _node("CLIPTextEncode", clip=["clip", 0], text=NEGATIVE),
        "latent": _node("EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=1),
        "first": _node("KSamplerAdvanced", model=["high", 0], latent_image=["latent", 0], **shared, **first),
        "second": _node("KSamplerAdvanced", model=["low", 0], latent_image=["first", 0], **shared, **last),
        "vae": _node("VAELoader", vae_name=files.vae.name),
        "frames": _node("VAEDecode", samples=["second", 0], vae=["vae", 0]),
        "seen": _node("FramesSeen", images=["frames", 0]),
    }


# The widgets of XDit+USP Config that have no default of their own; the precision is that of its guide.
CONFIG = {
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "use_fp16": False,
    "enable_activation_checkpointing": True,
    "enable_gradient_checkpointing": False,
    "max_batch_size": 1,
    "max_sequence_length": 8192,
    "overlap_p2p_comm": True,
    "use_flash_attention": True,
    "use_sdpa": True,
}


def _node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI process that answers graphs."""

    process: subprocess.Popen
    pid: int

    def ask(self, prompt_id: str, graph: dict) -> dict:
        """Run a graph; what headless.py says of it."""
        self.process.stdin.write(json.dumps({"id": prompt_id, "graph": graph}) + "\n")
        self.process.stdin.flush()
        return _answer(self.process)


def _answer(process: subprocess.Popen) -> dict:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"ComfyUI ended with status {process.wait()}; its words are above.")
    return json.loads(line)


@contextmanager
def comfyui_process(options: argparse.Namespace, settings: dict) -> Iterator[ComfyUI]:
    """ComfyUI in a process of its own, by this Python."""
    command = [sys.executable, str(HERE / "benchlib" / "headless.py"), str(options.comfyui), json.dumps(settings)]
    command += ["--cpu"] if options.cpu else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([*command, *options.comfyui_options.split()], text=True, **pipes)
    try:
        yield ComfyUI(process, _answer(process)["pid"])
    finally:
        _end(process)


@contextmanager
def ballast(gib: float, gpus: int) -> Iterator[int]:
    """Each GPU has `gib` GiB left in here; yields the bytes that the first has in all."""
    command = [sys.executable, str(HERE / "benchlib" / "ballast.py"), "--gib", str(gib), "--gpus", str(gpus)]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"The ballast ended with status {process.wait()}; its words are above.")
        yield int(line)
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """It ends with its stdin."""
    process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Reads:
    """What ComfyUI's process and the workers read of the model files."""

    def __init__(self, files: ModelFiles, comfyui: int, counts_touches: bool):
        self.files, self.comfyui, self.counts_touches = files, comfyui, counts_touches
        self.workers: tuple[int, ...] = ()

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.comfyui, *self.workers)

    def begin(self, drop: bool = True) -> dict[int, tuple[int, int]] | None:
        """Before a prompt: touches of mapped files count from now. `drop`: let the files leave the page cache."""
        for path in self.files.all if drop else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            for pid in self.pids if self.counts_touches else ():
                Path(f"/proc/{pid}/clear_refs").write_text("3")  # of mapped files
                Path(f"/proc/{pid}/smaps").read_bytes()
        except OSError as error:
            self.counts_touches = False
            log.warning("What is touched of mapped files is not counted, as this system does not tell: %s.", error)
        return _io(self.pids)

    def again(self, before: Mapping[int, tuple[int, int]] | None) -> int | None:
        """Bytes since `begin`, of each process by the way that shows most; None where the system does not tell."""
        after = _io(self.pids)
        if before is None or after is None:
            return None
        touched = [self._touched(pid) for pid in self.pids] if self.counts_touches else []
        grown = [max(b - a for a, b in zip(before[pid], after[pid], strict=True)) for pid in self.pids if pid in before]
        new = [max(after[pid]) for pid in self.pids if pid not in before]  # a worker that was started again
        return max(sum(grown) + sum(new), sum(touched))

    def since_start(self) -> dict[str, float]:
        """By the workers and by ComfyUI, as fields of a row."""
        counted = _io(self.pids)
        if counted is None:
            return {}
        disk, calls = ([counted[pid][i] for pid in self.workers] for i in (0, 1))
        return {
            "disk_w_gib": _gib(sum(disk)),
            "calls_w_gib": _gib(sum(calls)),
            "disk_c_gib": _gib(counted[self.comfyui][0]),
            "calls_c_gib": _gib(counted[self.comfyui][1]),
        }

    def _touched(self, pid: int) -> int:
        """Bytes of mapped model files that the process has used since `begin`."""
        text = Path(f"/proc/{pid}/smaps").read_text()
        names = "|".join(re.escape(str(path.resolve())) for path in self.files.all)
        return sum(int(kib) * 1024 for kib in re.findall(rf" (?:{names})\n(?:.*\n)*?Referenced: +(\d+) kB", text))


def _io(pids: Sequence[int]) -> dict[int, tuple[int, int]] | None:
    """read_bytes and rchar of each process; None where the system does not tell."""
    try:
        texts = {pid: Path(f"/proc/{pid}/io").read_text() for pid in pids}
    except OSError:
        return None
    fields = {pid: dict(line.split(": ") for line in text.splitlines()) for pid, text in texts.items()}
    return {pid: (int(f["read_bytes"]), int(f["rchar"])) for pid, f in fields.items()}


def _gib(nbytes: int) -> float:
    return round(nbytes / GIB, 3)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_DIR"), help="default: COMFYUI_DIR")
    parser.add_argument("--comfyui-options", default="", help="of ComfyUI's main.py, as one text")
    parser.add_argument("--dtype", choices=DTYPES, default="fp8_scaled", help="of the experts")
    parser.add_argument("--text-dtype", choices=DTYPES, default="fp8_scaled", help="of the text encoder")
    parser.add_argument("--blocks", type=int, help="of each expert, in place of all")
    parser.add_argument("--tiny", action="store_true", help="small experts and a small text encoder")
    parser.add_argument("--res", default="832x480x33", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="half of them by each expert")
    parser.add_argument("--cfg", type=float, default=3.5)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--memory-gib", type=float, help="of each GPU, in place of all")
    parser.add_argument("--cpu", action="store_true", help="everything on the CPU")
    parser.add_argument("--cold", action="store_true", help="the first prompt reads the files from the disk, too")
    parser.add_argument("--folder", type=Path, help="where the files are written, on a disk")
    parser.add_argument("--keep", action="store_true", help="write into --folder itself, once, and leave them there")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    options = parser.parse_args()
    if options.comfyui is None or not (options.comfyui / "execution.py").is_file():
        parser.error("COMFYUI_DIR does not name a ComfyUI folder. Set it, or give --comfyui.")
    if options.keep and options.folder is None:
        parser.error("--keep needs a folder to leave the files in. Give one with --folder.")
    if options.memory_gib and options.cpu:
        parser.error("--memory-gib is for GPUs. Leave it, or --cpu.")
    options.comfyui = options.comfyui.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
