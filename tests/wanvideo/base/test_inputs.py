"""Latents, texts and timesteps that no node should give: refused in two sentences, before anything is computed."""

from __future__ import annotations

import math

import pytest
import torch
from testkit.tiny import TINY, sentences
from wan_parallel.wanvideo.base.inputs import check_inputs, check_timestep
from wan_parallel.wanvideo.base.user_error import InputError

LATENT = torch.zeros(2, TINY.in_dim, 3, 4, 4)
TEXT = torch.zeros(2, 7, TINY.text_dim)


def with_number(tensor: torch.Tensor, number: float) -> torch.Tensor:
    """The tensor with one number changed."""
    changed = tensor.clone()
    changed.view(-1)[5] = number
    return changed


def test_float_tensors_of_every_precision_pass():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_inputs(TINY, LATENT.to(dtype), TEXT.to(dtype))
    check_inputs(TINY, LATENT[..., :1], TEXT)  # sizes need not be even: the model pads
    for timestep in (torch.tensor([999.0, 1.0]), torch.tensor([999, 1]), torch.zeros(2, 3)):
        check_timestep(LATENT, timestep)


@pytest.mark.parametrize(
    "latent",
    [
        LATENT[0],
        LATENT[:, :, 0],
        LATENT.unsqueeze(0),
        LATENT[:, :5],
        LATENT[:, :, :0],
        LATENT[..., :0],
        LATENT.long(),
        LATENT.bool(),
        LATENT.to(torch.complex64),
        LATENT.to(torch.float8_e4m3fn),
        LATENT.to("meta"),
        LATENT.to_sparse(),
        *(with_number(LATENT, number) for number in (math.nan, math.inf, -math.inf)),
        with_number(LATENT.half(), math.inf),
    ],
    ids=lambda latent: f"{list(latent.shape)} {latent.dtype} {latent.device} {latent.layout}",
)
def test_a_latent_that_is_none_is_refused(latent):
    with pytest.raises(InputError, match=r"[Tt]he latent") as refusal:
        check_inputs(TINY, latent, TEXT)
    assert sentences(str(refusal.value)) >= 2


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match="empty"):
        check_inputs(TINY, LATENT[:0], TEXT[:0])


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:, 0],
        TEXT[:1],
        TEXT[..., :3],
        TEXT[:, :0],
        TEXT.int(),
        TEXT.to(torch.complex64),
        with_number(TEXT, math.nan),
    ],
    ids=lambda text: f"{list(text.shape)} {text.dtype}",
)
def test_a_text_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="text conditioning") as refusal:
        check_inputs(TINY, LATENT, text)
    assert sentences(str(refusal.value)) >= 2


@pytest.mark.parametrize("timestep", [torch.zeros(3), torch.zeros(2, 2), torch.tensor([math.nan, 1.0])], ids=str)
def test_a_timestep_that_is_none_is_refused(timestep):
    with pytest.raises(InputError, match="timestep") as refusal:
        check_timestep(LATENT, timestep)
    assert sentences(str(refusal.value)) >= 2
