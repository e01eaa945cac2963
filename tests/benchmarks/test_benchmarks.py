"""Every program of benchmarks/ that measures something runs at toy size on CPU workers, and prints what it promises."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib import util
from types import ModuleType

import pytest
import testkit
from wan_parallel.distributed.client.pool import running
from wan_parallel.tools.tiny_wan.judging import T2V_FILE, VAE_FILE
from wan_parallel.wanvideo.attention import kitchen

FOLDER = testkit.ROOT / "benchmarks"

Run = Callable[..., list[dict]]
ON_CPU = ("--device", "cpu")

ELSEWHERE = {"strategies", "vae_decode", "peers", "vae_peers", "video_peers", "prompts", "headless", "ballast"}
"""Tested in test_strategies.py, test_vae_pool.py and, as they need ComfyUI, comfyui/test_comfyui_prompts.py, or as
peers of others; peers.py and ballast.py need a GPU."""

needs_tiny_wan = pytest.mark.skipif(
    not (T2V_FILE.is_file() and VAE_FILE.is_file()), reason=f"{T2V_FILE.name} is not in example_workflows/models"
)


def program(name: str) -> ModuleType:
    """A file of benchmarks/ as a module; the pack's folder may have the name of one."""
    (file,) = FOLDER.rglob(f"{name}.py")
    spec = util.spec_from_file_location(f"benchmark_{name}", file)
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def no_pools_of_others():
    """Programs measure the start of a pool; what other files of tests left running starts anew when it is asked."""
    while (pool := running()) is not None:
        pool.close()


@pytest.fixture
def run(monkeypatch, capfd) -> Run:
    """Runs a program in this process; gives the lines of JSON that it and its own processes print."""

    def run_program(name: str, *arguments: object) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code, output = program(name).main(), capfd.readouterr()
        assert not code, output.err
        return [json.loads(line) for line in output.out.splitlines() if line.startswith("{")]

    return run_program


@pytest.fixture(scope="module")
def toy(checkpoint) -> tuple[str, ...]:
    """Options for the tiny checkpoint in fp32."""
    return (*ON_CPU, "--size", "1.3b", "--model", checkpoint, "--precision", "fp32")


def test_dit_step(run, toy, tmp_path):
    rows = run("dit_step", *toy, "--res", "2x4x4,3x4x6", "--gpus", 2, "--iters", 1, "--out", tmp_path / "rows.jsonl")
    assert [row["res"] for row in rows] == ["2x4x4", "3x4x6"]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    for row in rows:
        assert row["finite"] and not row["lossy"] and row["ulysses"] == 2 and row["s"] > 0 and row["first_s"] > 0
        assert 0 < row["hop_s"] < row["s"] and "shares" not in row and "busy" not in row


@pytest.mark.skipif(kitchen.refusal("") is not None, reason="comfy-kitchen is not installed")
def test_sparse_steps(run, toy):
    rows = run(
        "dit_step", *toy, "--res", "2x16x16", "--gpus", 2, "--iters", 1, "--sparse", "dense", "keep=0.1,extra=64"
    )
    assert [row.get("sparse") for row in rows] == [None, "keep=0.1,extra=64"]
    assert [row["lossy"] for row in rows] == [False, True] and all(row["finite"] for row in rows)


def test_busy(run, toy):
    (row,) = run("dit_step", *toy, "--res", "2x4x4", "--gpus", 2, "--iters", 1, "--gpu-shares", "2,1", "--busy", "1")
    assert row["finite"] and (row["shares"], row["busy"]) == ("2,1", "1")


def test_video(run, toy):
    options = ("--res", "2x4x4,3x4x4", "--videos", 1, "--vae-precision", "fp32", "--vae-dim", 8)
    rows = run("video", *toy, *options, "--gpus", 2, "--peers", "diffusers", "--peer-gpus", 1, "--empty-caches")
    assert [(row["lib"], row["what"], row["res"]) for row in rows] == [
        (lib, what, res)
        for lib in ("diffusers", "wanparallel")
        for res in ("2x4x4", "3x4x4")
        for what in ("first forward", "video")
    ]
    firsts, videos = rows[::2], rows[1::2]
    assert [row["cold"] for row in firsts] == [True, False] * 2 and {row["caches"] for row in firsts} == {"empty"}
    assert firsts[2]["start_s"] > 0 and "start_s" not in firsts[3]
    for row in videos:
        assert row["finite"] and row["frames"] == ([5, 32, 32, 3] if row["res"] == "2x4x4" else [9, 32, 32, 3])
        assert row["sampling_s"] + row["decode_s"] <= row["s"] + 1e-3
        assert row["steps"] * row["step_s"] == pytest.approx(row["sampling_s"], rel=0.5)
    for row in videos[2:]:
        assert row["own_s"] + row["forward_s"] == pytest.approx(row["step_s"], rel=0.5)
        assert 0 < row["latents_s"] < row["own_s"] and 0 < row["own_share"] < 1


def test_the_peers_of_vae_decode(run, monkeypatch):
    port = program("dit_step").free_port()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    options = ("--lib", "diffusers", "--res", "2x2x3", "--dim", 8, "--precision", "fp32", "--iters", 1)
    (row,) = run("vae_peers", *ON_CPU, *options)
    assert row["lib"] == "diffusers" and row["finite"] and row["s"] > 0


def test_vae_convolutions(run):
    rows = run("vae_convolutions", *ON_CPU, "--shrink", 16, "--layers", "first,time0")
    assert [(row["layer"], row["way"]) for row in rows] == [
        (layer, way) for layer in ("first", "time0") for way in ("conv3d", "conv3d_ncdhw", "conv2d")
    ]
    assert all(row["ms"] > 0 and row.get("error", 0) < 2e-2 for row in rows)


def test_memory(run):
    (row,) = run("memory", "--size", "1.3b", "--gpus", 8, "--simulate")
    assert row["fits"] and row["simulated"] and 0 < row["allocated_gib"] <= 1


def test_load(run, tmp_path):
    options = ("--size", "1.3b", "--blocks", 1, "--gpus", 1, "--folder", tmp_path, "--warm-only")
    (row,) = run("load", *ON_CPU, *options)
    assert row["cached"] and 0 < row["start_s"] <= row["s"] and row["file_gib"] > 0.1  # rounded: a block takes no time
    assert not list(tmp_path.iterdir())


def test_lora_swap(run, tmp_path):
    options = ("--size", "1.3b", "--blocks", 1, "--gpus", 1, "--folder", tmp_path, "--rank", 4)
    (row,) = run("lora_swap", *ON_CPU, *options)
    assert all(math.isfinite(row[name]) for name in ("load", "first", "other", "again", "off")) and row["forward"] > 0
    assert not list(tmp_path.iterdir())


def test_displaced_steps(run, toy):
    variants = ("exact", "spatial,size=16,warmup=1")
    rows = run("displaced_steps", *toy, "--res", "3x8x8", "--gpus", 2, "--steps", 3, "--variants", *variants)
    assert [(row["variant"], row["kinds"]) for row in rows] == [("exact", "eee"), ("spatial,size=16,warmup=1", "fss")]
    assert all(row["finite"] for row in rows) and rows[1]["rel_to_exact"] > 0


def test_formats(run):
    formats = ("fp8 e4m3", "fp8_scaled, newer", "GGUF Q4_K")
    options = ("--size", "tiny", "--res", "2x4x4", "--iters", 1, "--precision", "fp32")
    rows = run("formats", *ON_CPU, *options, "--formats", *formats)
    assert tuple(row["format"] for row in rows) == formats
    for row in rows:
        assert row["finite"] and row["error"] < 1e-5 and row["error_16_bit"] == 0 and row["s"] > 0
        assert 0 < row["of_16_bit"] < 2 and row["weights_gib"] > 0


def test_dequantise(run):
    kinds = ("Q4_K", "Q8_0", "NVFP4")
    rows = run("dequantise", *ON_CPU, "--kinds", *kinds, "--rows", 8, "--columns", 1024, "--shares", 2, "--iters", 1)
    assert tuple(row["kind"] for row in rows) == kinds
    assert all((row["rows"], row["columns"]) == (8, 512) and row["torch_ms"] > 0 for row in rows)


@needs_tiny_wan
def test_displaced_quality(run, tmp_path):
    modes = ("--modes", "spatial", "--overlaps", 0, "--syncs", 3, "--warmups", "--no-fp8", "--warmup", 1)
    rows = run("displaced_quality", *ON_CPU, "--gpus", 2, "--prompts", 1, "--steps", 3, *modes, "--out", tmp_path)
    assert [row["kinds"] for row in rows] == ["eee", "ffs"] and rows[0]["equal"] and not rows[1]["equal"]
    assert "| spatial | 0 |" in (tmp_path / "quality-displaced.md").read_text()


@needs_tiny_wan
def test_quality(monkeypatch, capsys, tmp_path):
    arguments = ["--a", "gpus=1", "--b", "gpus=1,compute=bf16", "--prompts", "1", "--steps", "1", *ON_CPU]
    assert program("quality").main([*arguments, "--out", str(tmp_path)]) == 0
    row, summary = (json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines())
    assert row["psnr_db"] == summary["psnr_db_mean"] and 20 < row["psnr_db"] < 120
    assert "worst" in capsys.readouterr().out


def test_every_program_has_a_test():
    programs = {path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text(encoding="utf-8")}
    assert not [name for name in programs - ELSEWHERE if f"test_{name}" not in globals()]


# Pictures of what has been measured.


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return program("plot")


def test_pictures_show_medians_of_lines_that_are_committed(plot):
    source = plot.Source.read(plot.SHOWN)
    assert len(source.rows) == 20 and str(source) == "h200.jsonl, lines 7-26"
    series = plot.by_label(plot.cases(plot.forwards(source.rows))["14b", "720p"])
    assert next(iter(series)) == "WanParallel, FlashAttention-3" and len(series) == 3
    for name, seconds in series.items():
        rows = [row for row in source.rows if (row["size"], row["res"]) == ("14b", "720p") and plot.label(row) == name]
        assert seconds == {row["gpus"]: row["s"] for row in rows} and sorted(seconds) == [1, 2, 4]
        assert plot.efficiency(seconds)[4] == pytest.approx(seconds[1] / seconds[4] / 4)


def test_several_lines_of_one_kind_are_their_median_and_other_ways_to_run_are_kept_apart(plot):
    row = {"lib": "wanparallel", "attention": "sdpa", "compiled": False, "lossy": False, "gpus": 2, "s": 1.0}
    rows = [row, row | {"s": 2.0}, row | {"s": 9.0}, row | {"s": 0.5, "fp8": "products", "lossy": True}]
    assert plot.by_label(rows) == {"WanParallel, SDPA": {2: 2.0}, "WanParallel, SDPA, fp8 products, lossy": {2: 0.5}}
    assert plot.efficiency({2: 1.0}) == {}


def test_lines_that_a_file_has_not_are_refused(plot):
    with pytest.raises(ValueError, match=r"has no lines 7-999\. Write such as .*:1-"):
        plot.Source.read(plot.SHOWN.replace("7-26", "7-999"))


def test_plot(plot, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(sys, "argv", ["plot", "--size", "14b", "--out", str(tmp_path)])
    assert plot.main() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"forward.png", "efficiency.png"}
