"""Quantised weights hold what they say, in the bytes they say, and come out as the exact product."""

from __future__ import annotations

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.lora import Difference, LowRank, merge
from wan_parallel.wanvideo.model.layers import Linear
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.quant.formats.block_scaled import BlockScaledWeight
from wan_parallel.wanvideo.quant.formats.fp8 import FLOAT8, Fp8Weight
from wan_parallel.wanvideo.quant.formats.gguf_blocks import GgufWeight
from wan_parallel.wanvideo.quant.formats.int8 import Int8Weight
from wan_parallel.wanvideo.quant.quantized import QuantizedWeight, as_tensor, rows_together

GIVEN = tiny.inputs()
COMPUTE = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotated(weight: torch.Tensor, scale: torch.Tensor, group: int) -> Int8Weight:
    return Int8Weight((weight / scale).round().clamp(-127, 127).to(torch.int8), scale, group)


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


ONE = torch.ones(1, 1)
WEIGHTS = {
    "fp8 for each channel": Fp8Weight.quantize(normal(48, 96), torch.float8_e4m3fn),
    "fp8 for the matrix": Fp8Weight(normal(48, 96).to(torch.float8_e5m2), torch.full((1, 1), 0.37)),
    "plain fp8": Fp8Weight(normal(48, 96).to(torch.float8_e4m3fn)),
    "int8 for each channel": Int8Weight(normal(48, 96).mul(40).to(torch.int8), normal(48, 1, seed=1).abs()),
    "int8 convrot": rotated(normal(48, 96), torch.full((1, 1), 0.02), 16),
    "nvfp4": BlockScaledWeight("NVFP4", random_bytes(48, 48), random_bytes(48, 6) % 120, torch.full((1, 1), 0.37), 96),
    "mxfp8": BlockScaledWeight("MXFP8", random_bytes(48, 96) % 120, random_bytes(48, 3) // 8 + 99, ONE, 96),
}


@pytest.fixture(params=WEIGHTS)
def weight(request) -> QuantizedWeight:
    return WEIGHTS[request.param]


@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
@pytest.mark.parametrize("name", [name for name in WEIGHTS if "8" in name and name not in ("int8 convrot", "mxfp8")])
def test_dequantising_is_the_exact_product_rounded_once(name, dtype):
    weight = WEIGHTS[name]
    scale = 1.0 if "scale" not in weight.components() else weight.scale.double()
    assert torch.equal(weight.dequantize(dtype), (weight.data.double() * scale).to(dtype))


def test_a_rotation_is_undone():
    plain = normal(8, 512)
    signs = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.kron(torch.kron(torch.kron(signs, signs), signs), signs) / 16
    turned = (plain.view(8, 2, 256) @ matrix.T).flatten(1)
    held = rotated(turned, turned.abs().amax(dim=1, keepdim=True) / 127, 256)
    assert tiny.relative_error(held.dequantize(torch.float32), plain) < 0.01
    assert tiny.relative_error(held.narrow(1, 300, 100).dequantize(torch.float32), plain[:, 300:400]) < 0.02


def test_slices_are_exact(weight):
    whole = weight.dequantize(torch.float32)
    assert torch.equal(weight.narrow(0, 7, 20).dequantize(torch.float32), whole[7:27])
    part = weight.narrow(1, 24, 40)
    assert part.shape == (48, 40) and part.ndim == 2 and part.nbytes < weight.nbytes
    compact = part.contiguous()
    assert all(tensor.is_contiguous() for tensor in compact.components().values())
    assert torch.equal(compact.dequantize(torch.float32), whole[:, 24:64])
    assert torch.equal(part.dequantize(torch.float32), whole[:, 24:64])
    again = part.narrow(1, 9, 30).narrow(0, 40, 8)
    assert torch.equal(again.dequantize(torch.float32), whole[40:, 33:63])


GGUF = GgufWeight("Q8_0", torch.empty(0, 0, dtype=torch.uint8), 96).requantize(normal(48, 96))


@pytest.mark.parametrize("weight", [*WEIGHTS.values(), GGUF, normal(48, 96)], ids=[*WEIGHTS, "GGUF", "plain"])
def test_rows_from_several_places_are_one_weight(weight):
    joined, whole = rows_together([weight.narrow(0, 3, 5), weight.narrow(0, 30, 9)]), as_tensor(weight, torch.float32)
    assert joined.shape == (14, 96)
    assert torch.equal(as_tensor(joined, torch.float32), torch.cat([whole[3:8], whole[30:39]]))
    assert rows_together([weight]) is weight


def test_a_weight_is_rebuilt_from_its_components(weight):
    copies = {name: tensor.clone() for name, tensor in weight.components().items()}
    assert sum(tensor.nbytes for tensor in copies.values()) == weight.nbytes
    again = weight.narrow(1, 24, 40)
    again = again.replace({name: tensor.clone() for name, tensor in again.components().items()})
    assert torch.equal(again.dequantize(torch.float32), weight.dequantize(torch.float32)[:, 24:64])
    assert torch.equal(weight.replace(copies).dequantize(torch.float32), weight.dequantize(torch.float32))


def test_a_changed_weight_takes_no_more_room_than_a_scale_for_each_channel(weight):
    changed = normal(48, 96, seed=5)
    again = weight.requantize(changed)
    assert again.nbytes <= 48 * 96 * 1.0625  # of GGUF's Q8_0; a scale for each channel is less
    assert tiny.relative_error(again.dequantize(torch.float32), changed) < (0.06 if "e5m2" in weight.format else 0.03)


@pytest.mark.parametrize("dtype, worst", [(torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3)], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_rounding_to_fp8_keeps_every_channel_within_the_format(dtype, worst, size):
    plain = normal(64, 256) * size * torch.logspace(-3, 3, 64)[:, None]
    plain[5] = 0
    got = Fp8Weight.quantize(plain, dtype).dequantize(torch.float32)
    assert torch.isfinite(got).all() and not got[5].any()
    largest = plain.abs().amax(dim=1, keepdim=True)
    assert ((got - plain).abs() <= worst * plain.abs() + largest * 2**-15).all()
    assert tiny.relative_error(got, plain) < worst / 2


# In a model.


@pytest.mark.parametrize("name", FLOAT8)
def test_fp8_at_load_takes_a_byte_a_weight_and_computes_with_its_values(tmp_path, checkpoint, name):
    model = WanModel.from_checkpoint(checkpoint, FLOAT8[name])
    held, plain = dict(model.weights()), tiny.random_weights(tiny.TINY)
    assert set(held) == set(plain)
    matrices = {key for key, weight in plain.items() if weight.ndim == 2}
    of_blocks = {key for key in matrices if key.startswith("blocks.")}
    in_16_bit = matrices - of_blocks | {key.removesuffix("weight") + "bias" for key in of_blocks}
    for key, weight in held.items():
        if key in of_blocks:
            assert weight.nbytes == plain[key].numel() + 4 * len(plain[key])
        else:
            assert weight.dtype == (torch.bfloat16 if key in in_16_bit else torch.float32)
    computed = {key: weight.dequantize(torch.float32) for key, weight in held.items() if key in of_blocks}
    computed |= {key: held[key].float() for key in in_16_bit}
    reference = tiny.write_weights(tmp_path / "dequantised.safetensors", plain | computed)
    assert tiny.relative_error(model(*GIVEN), WanModel.from_checkpoint(reference)(*GIVEN)) <= 1e-6
    error = tiny.relative_error(model(*GIVEN), WanModel.from_checkpoint(checkpoint)(*GIVEN))
    assert 1e-3 < error < 0.15


def test_slices_of_tokens_convert_each_matrix_once_and_keep_nothing(checkpoint, monkeypatch):
    calls = []
    dequantize = Fp8Weight.dequantize
    monkeypatch.setattr(Fp8Weight, "dequantize", lambda self, dtype: calls.append(1) or dequantize(self, dtype))
    outputs = {}
    for step in (0, 10):
        calls.clear()
        model = WanModel.from_checkpoint(checkpoint, torch.float8_e4m3fn, slice_tokens=step)
        outputs[step] = model(*GIVEN)
        assert len(calls) == 10 * tiny.TINY.num_layers
        assert all(module.ready is None for module in model.modules() if isinstance(module, Linear))
    assert tiny.relative_error(outputs[10], outputs[0]) <= 1e-6


def test_what_lies_between_is_converted_once_for_all_slices_too(tmp_path, monkeypatch):
    path, calls = tiny.write_checkpoint(tmp_path / "humo.safetensors", tiny.HUMO), []
    dequantize, x = Fp8Weight.dequantize, tiny.inputs(tiny.HUMO, (3, 6, 8))
    monkeypatch.setattr(Fp8Weight, "dequantize", lambda self, dtype: calls.append(1) or dequantize(self, dtype))
    counts, outputs = [], []
    for step in (0, 5):
        calls.clear()
        model = WanModel.from_checkpoint(path, torch.float8_e4m3fn, slice_tokens=step)
        outputs.append(model(*x, tiny.conditioning(tiny.HUMO, x.x)))
        counts.append(len(calls))
        assert all(module.ready is None for module in model.modules() if isinstance(module, Linear))
    assert counts[0] == counts[1] == 14 * tiny.HUMO.num_layers
    assert tiny.relative_error(outputs[1], outputs[0]) <= 1e-6


def test_fp8_weights_on_workers_take_loras_and_give_them_back(pool_of, checkpoint):
    spec, pool = ModelSpec(checkpoint, "fp8_e4m3fn", "fp32"), pool_of(2)
    model = WanModel.from_checkpoint(checkpoint, torch.float8_e4m3fn)
    plain = pool.forward(spec, *GIVEN)
    assert tiny.relative_error(plain, model(*GIVEN)) <= 2e-6
    name, d = "blocks.0.self_attn.q.weight", tiny.TINY.dim
    changes = {
        name: [LowRank(normal(d, 4) * 0.2, normal(4, d) * 0.2, 0.7)],
        "blocks.1.ffn.2.bias": [Difference(normal(d), 0.1)],
    }
    patched = pool.forward(spec, *GIVEN, LoraSet("fp8-lora", lambda: changes))
    weights = tiny.random_weights(tiny.TINY)
    merged = {key: merge(weights[key], patches) for key, patches in changes.items()}
    model.set_weight(name, Fp8Weight.quantize(merged[name], torch.float8_e4m3fn))
    model.set_weight("blocks.1.ffn.2.bias", merged["blocks.1.ffn.2.bias"].bfloat16())
    assert tiny.relative_error(patched, model(*GIVEN)) <= 2e-6
    assert tiny.relative_error(patched, plain) > 1e-2
    assert torch.equal(pool.forward(spec, *GIVEN), plain)
