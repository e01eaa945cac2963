"""Sparse attention: which tokens stay exact, which blocks stay dense, and what is refused. Runs the plain reference."""

from __future__ import annotations

import math
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.worker.forward_attention import ForwardAttention, exact_tokens
from wan_parallel.wanvideo.attention import kitchen, sparse
from wan_parallel.wanvideo.attention.kernels import AttentionError, get_kernel
from wan_parallel.wanvideo.attention.sparse import ExactTokens, SparseAttention
from wan_parallel.wanvideo.base.attention_choice import SparseError, SparseSettings, blocks_in, sparse_bytes
from wan_parallel.wanvideo.base.conditioning import extended
from wan_parallel.wanvideo.base.grid import sequence_of

CPU = torch.device("cpu")
HIGH = SparseSettings(tau=4.0, extra_tokens=0, min_tokens=0)
with_kitchen = pytest.mark.skipif(kitchen.refusal("") is not None, reason="comfy-kitchen is not installed")


def heads(tokens: int, count: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, count, 128, generator=generator) for _ in range(3)]


def attend(settings: SparseSettings, exact: ExactTokens, qkv: list[torch.Tensor], block: int = 0) -> torch.Tensor:
    attention = SparseAttention(
        sparse.load(CPU, torch.float32, 128), get_kernel("sdpa", CPU, torch.float32), settings, exact
    )
    attention.block = block
    return attention.kernel(*qkv)


def errors_by_block(out: torch.Tensor, qkv: list[torch.Tensor]) -> list[float]:
    """The relative error of each block of 64 queries against dense attention."""
    dense = get_kernel("sdpa", CPU, torch.float32)(*qkv)
    pairs = zip(out.split(64, 1), dense.split(64, 1), strict=True)
    return [tiny.relative_error(got, expected) for got, expected in pairs]


@with_kitchen
@pytest.mark.parametrize(
    "exact, blocks",
    [
        (ExactTokens(), []),
        (ExactTokens(front=100), [0, 1]),
        (ExactTokens(tail=100), [8, 9]),
        (ExactTokens(front=60, tail=40), "the first 60 and the last 40"),
    ],
    ids=str,
)
def test_tokens_that_are_not_the_videos_attend_to_all_keys_exactly(exact, blocks):
    qkv = heads(640)
    out = attend(HIGH, exact, qkv)
    errors = errors_by_block(out, qkv)
    if blocks == "the first 60 and the last 40":
        dense = get_kernel("sdpa", CPU, torch.float32)(*qkv)
        for part in (slice(0, 60), slice(600, 640)):
            assert tiny.relative_error(out[:, part], dense[:, part]) < 1e-5
        assert min(errors[1:9]) > 1e-2
        return
    assert all((error < 1e-5) == (number in blocks) for number, error in enumerate(errors)), errors


@with_kitchen
def test_every_query_attends_to_those_tokens_exactly():
    q, k, v = heads(640)
    k[:, 600:] = 0.3 * q[:, :1]  # all of what matters to some queries lies there
    v[:, 600:] += 5
    apart = min(errors_by_block(attend(HIGH, ExactTokens(), [q, k, v]), [q, k, v])[:8])
    joined = min(errors_by_block(attend(HIGH, ExactTokens(tail=40), [q, k, v]), [q, k, v])[:8])
    assert joined < 0.9 * apart


@with_kitchen
def test_blocks_that_are_to_be_dense_are():
    qkv, settings = heads(320), SparseSettings(keep=0.2, dense_blocks=(3,), min_tokens=0)
    assert max(errors_by_block(attend(settings, ExactTokens(), qkv, block=3), qkv)) == 0
    assert max(errors_by_block(attend(settings, ExactTokens(), qkv, block=2), qkv)) > 1e-2


@with_kitchen
def test_a_head_has_the_same_bits_whatever_is_beside_it():
    qkv, settings = heads(320, count=5), SparseSettings(keep=0.2, min_tokens=0)
    whole = attend(settings, ExactTokens(), qkv)
    parts = [attend(settings, ExactTokens(), [x[:, :, s] for x in qkv]) for s in (slice(0, 2), slice(2, 5))]
    assert torch.equal(whole, torch.cat(parts, dim=2))
    assert attend(settings, ExactTokens(), [x[:, :, :0] for x in qkv]).shape == (1, 320, 0, 128)


@with_kitchen
def test_the_kernel_says_that_it_has_no_log_sum_exp():
    attention = SparseAttention(
        sparse.load(CPU, torch.float32, 128), get_kernel("sdpa", CPU, torch.float32), HIGH, ExactTokens()
    )
    kernel = attention.kernel
    assert not kernel.has_lse and kernel.lossy
    with pytest.raises(AttentionError, match="gives no log-sum-exp"):
        kernel.with_lse(*heads(64))


@pytest.mark.parametrize("name, config", tiny.VARIANTS.items(), ids=tiny.VARIANTS)
def test_references_and_context_are_no_tokens_of_the_video(name, config):
    x = tiny.inputs(config, size=(3, 8, 8)).x
    given = tiny.conditioning(config, x)
    longer, given = extended(x, given)
    grid = sequence_of(longer, given.options)
    exact = exact_tokens(grid, given.options)
    assert exact.front + exact.tail == grid.tokens - 3 * 16
    assert exact.front == (16 if name.startswith("fun-control") else 0)
    assert (exact.tail > 0) == (name in ("s2v", "scail", "scail-2"))


def test_further_frames_lie_behind_the_video():
    x = tiny.inputs(size=(3, 8, 8)).x
    given = tiny.conditioning(tiny.TINY, x).having(extra_frames=torch.randn(1, 16, 2, 8, 8))
    longer, given = extended(x, given)
    assert exact_tokens(sequence_of(longer, given.options), given.options) == ExactTokens(0, 32)


def test_a_variants_own_block_counts_as_the_block_of_the_video_before_it():
    attention, told = SimpleNamespace(block=0), []
    tell = ForwardAttention(sparse=attention).telling(lambda number: told.append((number, attention.block)), 4)
    for number in (0, 4, 1, 2, 5, 3):  # VACE's blocks have the numbers behind those of the video
        tell(number)
        told.append(attention.block)
    assert told[1::2] == [0, 0, 1, 2, 2, 3] and [number for number, _ in told[::2]] == [0, 4, 1, 2, 5, 3]


# The trial before the first use.


@with_kitchen
@pytest.mark.parametrize("harm", ["nothing", "sink_q", "sink_blocks", "tau", "topk_ratio", "values", "fails"])
def test_a_kernel_is_compared_with_its_reference_before_it_is_used(harm, monkeypatch):
    monkeypatch.setattr(sparse, "_tried", set())
    reference = sparse.load(CPU, torch.bfloat16, 128)

    def kernel(q, k, v, **options):
        if harm == "fails":
            raise RuntimeError("no image for this device")
        if harm == "values":
            v = v.roll(1, 1)
        return reference(q, k, v, **{name: value for name, value in options.items() if name != harm})

    if harm == "nothing":
        sparse._try_out(kernel, reference, CPU, torch.bfloat16)
        return
    with pytest.raises(AttentionError, match="fails on cpu" if harm == "fails" else "is wrong on cpu") as refusal:
        sparse._try_out(kernel, reference, CPU, torch.bfloat16)
    assert tiny.sentences(str(refusal.value)) == 2


# Refusals.


@pytest.mark.parametrize(
    "installed, said",
    [
        (None, "which is not installed. Install it with: pip install --no-deps 'comfy-kitchen>=0.2.33'"),
        ("0.2.24", "needs comfy-kitchen 0.2.33 or newer, and 0.2.24 is installed. Install it with"),
        ("0.2.9", "and 0.2.9 is installed"),
        ("0.2.33", ""),
        ("0.2.40.dev1", ""),
        ("0.3", ""),
        ("1.0.0", ""),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_named_with_the_line_that_installs_it(installed, said, monkeypatch):
    def version(_name):
        if installed is None:
            raise metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(metadata, "version", version)
    if not said:
        assert kitchen.refusal("Sparse attention") is None
        return
    with pytest.raises(AttentionError) as refusal:
        sparse.load(CPU, torch.float32, 128)
    assert said in str(refusal.value)
    with pytest.raises(AttentionError, match=r"^The attention kernel comfy_kitchen_int8 needs") as refusal:
        get_kernel("comfy_kitchen_int8", torch.device("cuda"), torch.bfloat16)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "capability, dtype, head_dim, said",
    [
        ((7, 5), torch.float16, 128, "needs a GPU of sm_80 or newer, and Old is sm_75"),
        ((9, 0), torch.float32, 128, "computes in 16 bit, and the activations are float32"),
        ((9, 0), torch.bfloat16, 64, "heads of 128 numbers, and this model's have 64"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_words(capability, dtype, head_dim, said, monkeypatch):
    gpu = SimpleNamespace(get_device_capability=lambda _device: capability, get_device_name=lambda _device: "Old")
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(kitchen, "refusal", lambda _what: None)
    with pytest.raises(AttentionError) as refusal:
        sparse.load(torch.device("cuda"), dtype, head_dim)
    assert said in str(refusal.value) and tiny.sentences(str(refusal.value)) == 2


@pytest.mark.parametrize(
    "settings, said",
    [
        (SparseSettings(tau=math.nan), "tau is nan"),
        (SparseSettings(tau=-1), "tau is -1"),
        (SparseSettings(keep=1.0), "keep_percent is 100"),
        (SparseSettings(keep=-0.1), "keep_percent is -10"),
        (SparseSettings(keep=math.nan), "keep_percent is nan"),
        (SparseSettings(extra_tokens=100), "extra_tokens is 100"),
        (SparseSettings(sigma_start=math.inf), "no beginning or no end"),
        (SparseSettings(min_tokens=-1), "min_tokens is -1"),
        (SparseSettings(dense_blocks=(0, 40)), "block 40, but this model has 40 blocks. Use numbers from 0 to 39"),
    ],
    ids=str,
)
def test_settings_out_of_their_range_are_refused_in_words(settings, said):
    with pytest.raises(SparseError, match=said) as refusal:
        settings.validate(40)
    assert tiny.sentences(str(refusal.value)) == 2


def test_lists_of_blocks_are_read():
    assert blocks_in("") == blocks_in(" , ") == ()
    assert blocks_in("0, 1, 47-49") == (0, 1, 47, 48, 49) == blocks_in("49 - 47;1 0, 1")


@pytest.mark.parametrize("text", ["first", "1.5", "-1", "1-", "1-2-3", "99999", "0x1"])
def test_other_lists_of_blocks_are_refused_in_words(text):
    with pytest.raises(SparseError, match="no number of a block") as refusal:
        blocks_in(text)
    assert tiny.sentences(str(refusal.value)) == 2


# Figures.


def test_the_expected_time_is_that_which_was_measured():
    """One H200, 75,600 tokens, 40 heads, in ms; FlashAttention-3 takes 172."""
    measured = {0.05: 28, 0.1: 46, 0.2: 83, 0.3: 119, 0.5: 191}
    for keep, milliseconds in measured.items():
        assert SparseSettings(keep=keep, extra_tokens=0).cost(40) == pytest.approx(milliseconds / 172, rel=0.05)
    for tau, milliseconds in {1.0: 64, 1.5: 30.5}.items():
        assert SparseSettings(tau=tau, extra_tokens=0).cost(40) == pytest.approx(milliseconds / 172, rel=0.15)
    for extra in (64, 128, 256):
        assert SparseSettings(keep=0.1, extra_tokens=extra).cost(40) == pytest.approx(58.2 / 172, rel=0.05)
    assert SparseSettings(keep=0.1, extra_tokens=0, dense_blocks=(0, 1)).cost(2) == 1


def test_the_expected_memory_is_that_which_was_measured():
    """GiB on one H200, with extra tokens."""
    for tokens, count, gib in ((75_600, 40, 1.974), (75_600, 20, 1.028), (32_760, 40, 0.853)):
        assert gib <= sparse_bytes(tokens, count) / 2**30 <= 1.06 * gib
