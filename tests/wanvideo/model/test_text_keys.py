"""Keys and values of a text are computed once a run, and give what they gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from testkit import tiny
from testkit.shared.one_rank import Rank
from wan_parallel.distributed.protocol.requests import Offload
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.model.layers import Attention
from wan_parallel.wanvideo.model.model import model_class
from wan_parallel.wanvideo.model.text_keys import MOST, TextKeys

NAMES = ["t2v", "i2v-2.1", "vace", "humo", "s2v", "animate"]
ROOM = 2**40


class Counted:
    """A model with keys kept, and how often its blocks have computed some."""

    def __init__(self, path: str, config: WanConfig = tiny.TINY, room: int = ROOM):
        self.model = model_class(config).from_checkpoint(path)
        self.model.text_keys = TextKeys(lambda: room)
        self.computed = 0
        for blocks in (self.model.blocks, getattr(self.model, "vace_blocks", ())):
            for block in blocks:
                block.cross_attn.k.register_forward_hook(self._count)

    def _count(self, *_call: object) -> None:
        self.computed += 1

    def __call__(self, inputs: tiny.Inputs, text: torch.Tensor | None = None, **changed: torch.Tensor):
        """The result, and how often keys were computed for it."""
        before, both = self.computed, tiny.conditioning(self.model.config, inputs.x)
        for name, tensor in changed.items():
            object.__setattr__(both, name, tensor)
        context = inputs.context if text is None else text
        with torch.inference_mode():
            out = self.model(inputs.x, inputs.timestep, context, both)
        return out, self.computed - before


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[str, WanConfig]]:
    folder = tmp_path_factory.mktemp("texts")
    configs = {name: tiny.VARIANTS.get(name, tiny.TINY) for name in NAMES}
    return {name: (tiny.write_checkpoint(folder / f"{name}.safetensors", own), own) for name, own in configs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_second_step_computes_none_and_gives_the_same_bits(files, name):
    counted, plain = Counted(*files[name]), Counted(*files[name], room=0)
    inputs = tiny.inputs(counted.model.config)
    expected, each_time = plain(inputs)
    first, computed = counted(inputs)
    assert computed == each_time > 0 and torch.equal(first, expected)
    for seed in (3, 4):
        later = tiny.inputs(counted.model.config, seed=seed)._replace(context=inputs.context)
        out, computed = counted(later)
        assert computed == 0 and torch.equal(out, plain(later)[0])


def test_both_branches_are_kept_and_the_oldest_goes(files):
    counted, inputs = Counted(*files["t2v"]), tiny.inputs()
    texts = [torch.randn_like(inputs.context) for _ in range(MOST + 1)]
    for text in texts[:MOST]:
        assert counted(inputs, text)[1] > 0
    for order in (texts[:MOST], texts[MOST - 1 :: -1], texts[:MOST]):
        assert [counted(inputs, text)[1] for text in order] == [0] * MOST
    assert counted(inputs, texts[MOST])[1] > 0
    assert counted(inputs, texts[0])[1] > 0 and counted(inputs, texts[2])[1] == 0
    counted.model.text_keys.clear()
    assert counted(inputs, texts[2])[1] > 0


def test_another_image_is_another_text(files):
    counted = Counted(*files["i2v-2.1"])
    inputs = tiny.inputs(counted.model.config)
    image = tiny.conditioning(counted.model.config, inputs.x).image
    out, computed = counted(inputs)
    changed, again = counted(inputs, image=2 * image)
    assert computed == again > 0 and not torch.equal(out, changed)
    assert counted(inputs)[1] == counted(inputs, image=2 * image)[1] == 0


def test_their_bytes_are_counted(files):
    counted, inputs = Counted(*files["i2v-2.1"]), tiny.inputs(tiny.I2V_CLIP, batch=2)
    counted(inputs)
    kept = counted.model.text_keys
    (keys,) = (text.keys for text in kept._texts)
    assert set(map(type, keys)) == {Attention}
    assert kept.nbytes == sum(x.nbytes for pairs in keys.values() for pair in pairs for x in pair)


def test_a_worker_forgets_them_with_a_lora_and_where_room_is_needed(tmp_path: Path):
    rank = Rank(ModelSpec(tiny.write_checkpoint(tmp_path / "model.safetensors"), "fp32", "fp32"))
    inputs, model = tiny.inputs(), rank.loaded.model

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return model(*inputs)

    plain = forward()
    assert rank.loaded.text_bytes > 0
    rank.lora("some", 1, ["blocks.0.cross_attn.k.weight"])
    assert rank.loaded.text_bytes == 0 and not torch.equal(forward(), plain)
    rank.lora("none", 1, [])
    assert torch.equal(forward(), plain)
    rank.models.offload(Offload(1, rank.spec, (0,), 0))
    assert rank.loaded.text_bytes == 0 and torch.equal(forward(), plain)


def test_a_worker_keeps_none_beside_patches_nor_where_the_forward_needs_the_room(tmp_path: Path, monkeypatch):
    rank = Rank(ModelSpec(tiny.write_checkpoint(tmp_path / "model.safetensors"), "fp32", "fp32", offload="off"))
    inputs, model = tiny.inputs(), rank.loaded.model

    def kept(tokens: int, **given: bool) -> int:
        rank.models.memory.forget_texts()
        rank.models.settle(rank.spec, tokens, **given)
        with torch.inference_mode():
            model(*inputs)
        return rank.loaded.text_bytes

    needed = kept(64)
    assert needed > 0 and kept(64, keep_texts=False) == 0 and kept(64) == needed
    free = rank.loaded.demand.activations + rank.models.memory.device_bytes + 2 * needed
    monkeypatch.setattr(rank.models.memory, "free", lambda: free)
    assert kept(64) == needed and kept(10**6) == 0
