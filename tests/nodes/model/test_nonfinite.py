"""Where NaN in a result comes from is said once, and names the tensor."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.nodes.model.nonfinite import explain, refuse_explained
from wan_parallel.wanvideo.base.conditioning import NOTHING, Conditioning
from wan_parallel.wanvideo.base.lora import LowRank
from wan_parallel.wanvideo.model.model import WanModel

GIVEN = tiny.inputs()
INPUTS = GIVEN._asdict()
BROKEN = torch.full((1, 16, 3, 6, 8), torch.nan)


def write(path: Path, **broken: float) -> str:
    weights = tiny.random_weights(tiny.TINY)
    for name, value in broken.items():
        weights[name].view(-1)[7] = value
    return tiny.write_weights(path, weights)


def said(caplog, result=BROKEN, spec=None, inputs=INPUTS, conditioning=NOTHING, loras=None) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        explain(result, inputs, conditioning, spec, loras, lambda: None)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_file_with_nan_is_named_with_its_tensors_once(tmp_path, caplog, value):
    names = ("blocks.1.ffn.0.weight", "head.modulation")
    path = write(tmp_path / "broken.safetensors", **dict.fromkeys(names, value))
    with torch.no_grad():
        result = WanModel.from_checkpoint(path)(*GIVEN)
    first = said(caplog, result, ModelSpec(path))
    assert "broken.safetensors has numbers that are NaN or infinite in 2 tensors" in first[-1]
    assert all(name in first[-1] for name in names) and "Download the file again" in first[-1]
    assert said(caplog, result, ModelSpec(path)) == []
    refuse_explained(GIVEN.x, ModelSpec(path), None)  # the next run
    with pytest.raises(ValueError, match="in 2 tensors") as error:
        refuse_explained(result, ModelSpec(path), None)
    assert tiny.sentences(str(error.value)) == 2


def test_a_result_of_numbers_needs_no_word_and_no_reading(caplog):
    assert said(caplog, torch.ones(2, 3), ModelSpec("/nowhere.safetensors")) == []


def test_inputs_are_blamed_before_the_file(caplog):
    spec = ModelSpec("/nowhere.safetensors", stamp="inputs")
    (text,) = said(caplog, spec=spec, inputs=INPUTS | {"text": BROKEN}, conditioning=Conditioning(image=BROKEN))
    assert "(text, image)" in text and "was given" in text and tiny.sentences(text) == 2


def test_inputs_of_an_earlier_prompt_are_not_blamed(tmp_path, caplog):
    spec = ModelSpec(write(tmp_path / "earlier.safetensors"))
    said(caplog, spec=spec, inputs=INPUTS | {"text": BROKEN})
    assert "beyond the range" in said(caplog, spec=spec)[-1]
    with pytest.raises(ValueError, match="beyond the range"):
        refuse_explained(BROKEN, spec, None)
    said(caplog, torch.ones(2, 3), spec)
    assert said(caplog, spec=spec) == [], "the weights are read once"


def test_a_lora_with_nan_is_named_with_its_weights(tmp_path, caplog):
    path = write(tmp_path / "sound.safetensors")
    deltas = {"blocks.0.ffn.0.weight": [LowRank(BROKEN[0, 0, 0], torch.ones(8, 4), 1.0)], "head.head.weight": []}
    *_, text = said(caplog, spec=ModelSpec(path), loras=LoraSet("one", lambda: deltas))
    assert "A LoRA has numbers that are NaN or infinite for 1 weights: blocks.0.ffn.0.weight." in text


def test_sound_weights_leave_the_precision(tmp_path, caplog):
    path = write(tmp_path / "sound.safetensors")
    *_, text = said(caplog, spec=ModelSpec(path, compute_dtype="fp16"))
    assert "beyond the range of fp16. Switch use_bf16 on" in text
    assert "beyond the range of bf16" in said(caplog, spec=ModelSpec("random:14b"))[-1]


def test_cancel_ends_the_search(tmp_path):
    def cancelled() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain(BROKEN, INPUTS, NOTHING, ModelSpec(write(tmp_path / "x.safetensors")), None, cancelled)
