"""The README's support table, run: by pairs of variant, format and strategy, or whole (see support_matrix.py)."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
import testkit
import torch
from testkit import support_matrix, tiny
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.model.model import model_class

TOOL = testkit.ROOT / "tools" / "support_table.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives the model of a variant and format, and its output in this process for `given(variant)`."""
    folder, made = tmp_path_factory.mktemp("support"), {}

    def get(variant: str, kind: str) -> tuple[ModelSpec, torch.Tensor]:
        if (variant, kind) not in made:
            spec, meant = support_matrix.write(folder / f"{variant} {kind}", variant, kind)
            alone = model_class(support_matrix.VARIANTS[variant]).from_checkpoint(meant.path, module=meant.module)
            made[variant, kind] = spec, alone(*given(variant))
        return made[variant, kind]

    return get


def given(variant: str) -> tuple:
    config = support_matrix.VARIANTS[variant]
    inputs = tiny.inputs(config, size=(2, 4, 6), batch=2)
    return (*inputs, tiny.conditioning(config, inputs.x))


@pytest.mark.parametrize("variant, strategy", list(support_matrix.cells()), ids=str)
def test_a_variant_runs_in_its_formats_under_a_strategy(pool_of, models, variant, strategy, request):
    how, inputs = support_matrix.STRATEGIES[strategy], given(variant)
    if (variant, strategy) in support_matrix.REFUSED:
        spec, _ = models(variant, "bf16")
        pool = Pool(PoolSettings(ParallelPlan(how.gpus, **how.degrees), device="cpu"))
        with pytest.raises(PlanError):
            pool.forward(spec, *inputs[:3], conditioning=inputs[3])
        return
    pool, formats = pool_of(how.gpus, **how.degrees), support_matrix.formats_by_pairs(variant, strategy)
    if request.config.getoption("full_support_matrix"):
        formats = support_matrix.formats_of(variant)
    for kind in formats:
        spec, expected = models(variant, kind)
        spec = replace(spec, max_batch=2, **how.options)
        out = pool.forward(spec, *inputs[:3], conditioning=inputs[3])
        assert tiny.relative_error(out, expected) <= 1e-5, kind
    pool.unload()


def test_a_run_by_pairs_leaves_out_no_pair():
    run = [
        (variant, strategy, kind)
        for variant, strategy in support_matrix.cells()
        for kind in support_matrix.formats_by_pairs(variant, strategy)
    ]
    in_formats = {(variant, kind) for variant in support_matrix.VARIANTS for kind in support_matrix.formats_of(variant)}
    assert {(variant, strategy) for variant, strategy, _ in run} == set(support_matrix.cells())
    assert {(variant, kind) for variant, _, kind in run} == in_formats
    pairs = set(itertools.product(support_matrix.STRATEGIES, support_matrix.FORMATS))
    assert {(strategy, kind) for _, strategy, kind in run} == pairs


def test_the_readme_says_what_was_run():
    readme = (testkit.ROOT / "README.md").read_text(encoding="utf-8")
    assert support_matrix.table() in readme  # else run tools/support_table.py
    checked = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_tool_writes_between_its_marks_alone(tmp_path, monkeypatch):
    readme, tool = tmp_path / "README.md", runpy.run_path(str(TOOL))
    readme.write_text("before\n<!-- support table -->\nold\n<!-- end of support table -->\nafter\n")
    for arguments, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--readme", str(readme), *arguments])
        assert tool["main"]() == code
    text = readme.read_text()
    assert text.startswith("before\n<!-- support table -->\n")
    assert text.endswith("<!-- end of support table -->\nafter\n")
    assert support_matrix.table() in text and "old" not in text
