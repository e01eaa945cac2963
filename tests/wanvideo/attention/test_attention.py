"""Every attention kernel gives softmax(q k^T / sqrt(D)) v and the log-sum-exp of its scores, or says why not.

Here the CPU's kernel and the choice among the others; gpu/test_gpu_kernels.py runs those that need a GPU.
"""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import testkit
import torch
from wan_parallel.wanvideo.attention import flash3, kernels
from wan_parallel.wanvideo.attention.kernels import AttentionError, AttentionKernel, available_kernels, get_kernel

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
LSE_TOLERANCE = 5e-4


def tensors(q_shape, k_length, dtype, device=CPU, seed=0):
    """q, k, v as a block of the model hands them over: [B, S, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    k_shape = (q_shape[0], k_length, *q_shape[2:])
    shapes = (q_shape, k_shape, k_shape)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def reference(q, k, v):
    """Plain attention and log-sum-exp in float64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def check(kernel, q, k, v, out_tolerance, lse_tolerance=LSE_TOLERANCE):
    expected, expected_lse = reference(q, k, v)
    out = kernel(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert relative_error(out, expected) <= out_tolerance
    if kernel.has_lse:
        out, lse = kernel.with_lse(q, k, v)
        assert relative_error(out, expected) <= out_tolerance
        assert lse.shape == expected_lse.shape and lse.dtype == torch.float32
        assert float((lse.double() - expected_lse).abs().max()) <= lse_tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_length, k_length", [(1, 1), (37, 50), (50, 37), (128, 512)])
def test_the_cpu_kernel_matches_float64(dtype, q_length, k_length):
    kernel = get_kernel("sdpa", CPU, dtype)
    check(kernel, *tensors((2, q_length, 3, 32), k_length, dtype), OUT_TOLERANCE[dtype])


def test_any_strides_do_where_the_last_dimension_is_contiguous():
    q, k, v = tensors((2, 40, 3, 32), 40, torch.float32)
    packed = torch.stack((q, k, v), dim=2)  # as one projection or one exchange leaves them
    kernel = get_kernel("sdpa", CPU, torch.float32)
    check(kernel, *packed.unbind(2), OUT_TOLERANCE[torch.float32])
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(kernel, *heads_first, OUT_TOLERANCE[torch.float32])


def test_blocks_of_keys_merge_exactly_with_the_log_sum_exp():
    q, k, v = tensors((1, 60, 2, 64), 90, BF16)
    kernel = get_kernel("sdpa", CPU, BF16)
    blocks = [kernel.with_lse(q, *kv) for kv in zip(k.split(30, 1), v.split(30, 1), strict=True)]
    lse = torch.stack([block for _, block in blocks])
    weights = lse.softmax(0).transpose(2, 3).unsqueeze(-1)  # [blocks, B, S, H, 1]
    merged = sum(w * out.double() for w, (out, _) in zip(weights, blocks, strict=True))
    assert relative_error(merged, reference(q, k, v)[0]) <= OUT_TOLERANCE[BF16]


@pytest.mark.parametrize("q_length, k_length", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_share_of_tokens_or_keys_counts_for_nothing(q_length, k_length):
    q, k, v = tensors((1, q_length, 2, 16), k_length, torch.float32)
    out, lse = get_kernel("sdpa", CPU, torch.float32).with_lse(q, k, v)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == (1, 2, q_length) and torch.isneginf(lse).all()


def test_an_empty_share_of_heads_has_an_empty_result():
    q, k, v = tensors((1, 5, 0, 16), 7, torch.float32)
    out, lse = get_kernel("sdpa", CPU, torch.float32).with_lse(q, k, v)
    assert out.shape == (1, 5, 0, 16) and lse.shape == (1, 0, 5)


def test_auto_is_sdpa_on_a_cpu():
    assert get_kernel("auto", CPU, torch.float32).name == "sdpa"
    assert available_kernels(CPU, BF16) == ("sdpa",)


def test_kernel_packages_are_not_imported_with_the_module():
    packages = ("flash_attn", "fa3_fwd_interface", "flash_attn_interface", "sageattention", "triton", "cutlass")
    root = testkit.ROOT
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import bootstrap; bootstrap.load_pack()\n"
        "import torch\n"  # torch itself may bring triton
        f"before = set(sys.modules); import wan_parallel.wanvideo.attention.kernels\n"
        f"print([name for name in {packages} if name in set(sys.modules) - before])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize(
    "name, reason",
    [
        ("flash_attn_3", "does not run on cpu"),
        ("sageattn", "does not run on cpu"),
        ("nonsense", "There is no attention kernel 'nonsense'"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused_in_two_sentences(name, reason):
    with pytest.raises(AttentionError, match=reason) as refusal:
        get_kernel(name, CPU, BF16)
    assert str(refusal.value).count(". ") == 1


def test_auto_with_nothing_allowed_says_what_to_switch_on():
    with pytest.raises(AttentionError, match="use_sdpa"):
        get_kernel("auto", CPU, BF16, allow_sdpa=False)


def test_float64_is_refused():
    with pytest.raises(AttentionError, match="can't compute in float64"):
        get_kernel("sdpa", CPU, torch.float64)


# What is picked on GPUs; none is needed to ask.


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU of some compute capability."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")

    return pretend


@pytest.mark.parametrize(
    "capability, order",
    [
        ((8, 0), ("flash_attn_2", "sdpa")),
        ((8, 9), ("flash_attn_2", "sdpa")),
        ((9, 0), ("flash_attn_3", "flash_attn_4", "sdpa")),
        ((10, 0), ("flash_attn_4", "sdpa")),
        ((12, 0), ("flash_attn_4", "sdpa")),
    ],
)
def test_auto_prefers_the_fastest_exact_kernel_of_the_gpu(gpu, capability, order):
    gpu(*capability)
    assert kernels._preference(CUDA, BF16, True, True) == order


def test_auto_never_picks_a_lossy_kernel(gpu):
    for capability in ((8, 9), (9, 0), (10, 0)):
        gpu(*capability)
        assert "sageattn" not in kernels._preference(CUDA, BF16, True, True)


def test_the_switches_of_the_config_node_hold_auto_back(gpu):
    gpu(9, 0)
    assert kernels._preference(CUDA, BF16, False, True) == ("sdpa",)
    assert "sdpa" not in kernels._preference(CUDA, BF16, True, False)
    assert kernels._preference(CUDA, BF16, False, False) == ()


def test_float32_on_a_gpu_is_left_to_sdpa(gpu):
    gpu(9, 0)
    assert kernels._preference(CUDA, torch.float32, True, True) == ("sdpa",)
    with pytest.raises(AttentionError, match=r"can't compute in float32\. Use bfloat16 or float16"):
        get_kernel("sdpa_flash", CUDA, torch.float32)


def test_a_missing_package_is_refused_with_its_install_line(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(flash3, "has_module", lambda name: False)
    with pytest.raises(AttentionError, match=r"is not installed\. Install it with: pip install .*fa3-fwd"):
        get_kernel("flash_attn_3", CUDA, BF16)


def test_a_kernel_of_another_generation_is_refused(gpu, fake_package):
    fake_package("fa3_fwd_interface", "def flash_attn_func(q, k, v): ...")
    gpu(10, 0)
    with pytest.raises(AttentionError, match="does not run on sm_100"):
        get_kernel("flash_attn_3", CUDA, BF16)
    assert "flash_attn_3" not in available_kernels(CUDA, BF16)


# Packages with the traps of the real ones.


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Writes a module that can be imported during the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> None:
        path = tmp_path / Path(*name.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for name in [name for name, module in sys.modules.items() if _lies_in(module, tmp_path)]:
        del sys.modules[name]


def _lies_in(module, folder: Path) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(str(folder))


def test_the_fa3_wheel_is_bf16_only(gpu, fake_package):
    gpu(9, 0)
    fake_package("fa3_fwd_interface", "def flash_attn_func(q, k, v): ...")
    assert "flash_attn_3" in available_kernels(CUDA, BF16)
    assert "flash_attn_3" not in available_kernels(CUDA, torch.float16)


@pytest.mark.skipif(find_spec("fa3_fwd_interface") is not None, reason="a real FlashAttention-3 is installed")
def test_the_placeholder_package_of_fa3_does_not_count(gpu, fake_package):
    gpu(9, 0)
    fake_package("flash_attn_interface", "")
    assert "flash_attn_3" not in available_kernels(CUDA, BF16)


def test_flash_attn_4_alone_does_not_pass_for_flash_attn_2(gpu, fake_package):
    gpu(9, 0)
    fake_package("flash_attn.cute.interface", "")
    fake_package("cutlass", "")
    names = available_kernels(CUDA, BF16)
    assert "flash_attn_4" in names and "flash_attn_2" not in names


SAGE_1 = """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    k -= k.mean(dim=1, keepdim=True)
    return q
"""


def test_sageattention_1_keeps_its_hands_off_the_keys_and_gives_no_log_sum_exp(fake_package):
    fake_package("sageattention", SAGE_1)
    q, k, v = tensors((1, 8, 2, 64), 8, BF16)
    before = k.clone()
    kernel = AttentionKernel("sageattn", kernels._load_sageattn(), kernels._sageattn_has_lse(), lossy=True)
    kernel(q, k, v)
    assert torch.equal(k, before)
    with pytest.raises(AttentionError, match="Set ring_degree to 1"):
        kernel.with_lse(q, k, v)


def sdpa_with(change):
    """The CPU kernel with a log-sum-exp spoilt by `change`."""

    def forward(q, k, v, want_lse):
        out, lse = kernels._sdpa_cpu(q, k, v, want_lse)
        return out, lse if lse is None else change(lse)

    return AttentionKernel("spoilt", forward)


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda lse: lse.to(BF16), lambda lse: lse / math.log(2), lambda lse: lse * math.nan],
    ids=["zero", "rounded to bf16", "base 2", "nan"],
)
def test_a_kernel_with_a_wrong_log_sum_exp_is_refused(change):
    with pytest.raises(AttentionError, match="log-sum-exp"):
        kernels._try_out(sdpa_with(change), CPU, BF16)


def test_a_kernel_with_a_right_log_sum_exp_passes():
    kernels._try_out(sdpa_with(lambda lse: lse.unsqueeze(-1)), CPU, BF16)


def test_a_kernel_that_fails_is_refused():
    def forward(q, k, v, want_lse):
        raise RuntimeError("no kernel image is available")

    with pytest.raises(AttentionError, match="no kernel image is available"):
        kernels._try_out(AttentionKernel("broken", forward), CPU, BF16)


def test_a_kernel_that_keeps_its_log_sum_exp_back_is_refused():
    """Another version of a package may ignore that it is asked for one."""
    kernel = AttentionKernel("silent", lambda q, k, v, want_lse: (kernels._sdpa_cpu(q, k, v, False)[0], None))
    with pytest.raises(AttentionError, match="The attention kernel silent gives no log-sum-exp, which a ring needs"):
        kernel.with_lse(*(torch.ones(1, 4, 2, 16) for _ in range(3)))
    with pytest.raises(AttentionError, match="fails on cpu"):
        kernels._try_out(kernel, CPU, BF16)
