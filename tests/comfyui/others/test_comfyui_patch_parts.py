"""Weight patches of parts of weights, as ComfyUI's `add_patches` takes them with a tuple for a key."""

from __future__ import annotations

import pytest
from testkit.comfyui.graphs import ksampler, link, node, pool_model, stock_model
from testkit.comfyui.refusals import error_text
from testkit.comfyui.results import EXACT, plain, sampled
from testkit.tiny import relative_error


def patched(loader, start: int = 64, **config) -> dict:
    parts = {"parts": node("PatchParts", model=link("model"), start=start)}
    return {**plain(loader), **loader(**config), **parts, **ksampler(model="parts")}


@pytest.mark.parametrize("config", [{}, {"tensor_parallel_size": 2}], ids=["sequence", "tensor"])
def test_patches_of_parts_change_what_comfyui_changes(server, config):
    native = sampled(server, patched(stock_model))
    assert relative_error(sampled(server, plain(stock_model)), native) > 0.01
    assert relative_error(sampled(server, patched(pool_model, **config)), native) <= EXACT


def test_a_part_outside_its_weight_is_refused(server):
    message = error_text(server, patched(pool_model, start=200))
    assert "(0, 200, 64)) that lies outside this weight of shape (256, 256)" in message
    assert "blocks.0.self_attn.q.weight" in message
