"""Attention kernels behind one interface: the output, and the log-sum-exp that a ring needs.

A kernel takes queries `[B, S_q, H, D]` and keys and values `[B, S_k, H, D]` (last dimension contiguous, any
other strides), applies softmax(q k^T / sqrt(D)) v without a mask, and gives `[B, S_q, H, D]` in q's dtype.
`with_lse` gives the natural-log log-sum-exp of the scaled scores too, `[B, H, S_q]` in float32. Results over
different keys are merged with it; one rounded to bf16 would make the merge six times less exact.

Packages are looked up when a kernel is asked for, never at import: importing some of them starts CUDA.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.packages import has_module
from ..base.user_error import UserError
from . import flash3, fp8_attention, kitchen

log = logging.getLogger(__name__)

aten = torch.ops.aten

SIXTEEN_BIT = frozenset({torch.float16, torch.bfloat16})

# (q, k, v, want_lse) -> (out, lse or None); lse may carry a trailing 1 and padding after S_q
Forward = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, "Tensor | None"]]


class AttentionError(UserError, ValueError):
    """An attention kernel is not installed, or cannot run on this device or in this dtype."""


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention; made by `get_kernel`.

    Args:
        has_lse: whether `with_lse` works.
        lossy: whether the kernel quantises its inputs.
        bound: the greatest relative error of a lossy kernel's output on normal numbers.
    """

    name: str
    forward: Forward
    has_lse: bool = True
    lossy: bool = False
    bound: float = 5e-2

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, `[B, S_q, H, D]` in the dtype of `q`. q, k and v are `[B, S, H, D]`."""
        if q.numel() == 0 or k.numel() == 0:
            return _attend_to_nothing(q)[0]
        return self.forward(q, k, v, False)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output `[B, S_q, H, D]` and the log-sum-exp `[B, H, S_q]` in float32.

        Raises:
            AttentionError: the kernel gives no log-sum-exp.
        """
        if not self.has_lse:
            raise self._without_lse()
        if q.numel() == 0 or k.numel() == 0:
            return _attend_to_nothing(q)
        out, lse = self.forward(q, k, v, True)
        if lse is None:
            raise self._without_lse()
        if lse.dim() == 4:  # cuDNN keeps a last dimension of 1
            lse = lse.squeeze(-1)
        return out, lse[..., : q.shape[1]].float()  # the efficient kernel pads S_q to a multiple of 32

    def _without_lse(self) -> AttentionError:
        return AttentionError(
            f"The attention kernel {self.name} gives no log-sum-exp, which a ring needs. "
            "Set ring_degree to 1 or pick another attention kernel."
        )


def get_kernel(
    name: str, device: torch.device, dtype: torch.dtype, allow_flash: bool = True, allow_sdpa: bool = True
) -> AttentionKernel:
    """The kernel called `name`, tried out once on this device and dtype.

    Args:
        name: one of `KERNEL_NAMES`; `auto` picks the fastest exact kernel that is installed.
        allow_flash, allow_sdpa: whether `auto` may pick the flash-attn packages, and torch's own kernels.

    Raises:
        AttentionError: the kernel is unknown, not installed, wrong, or unable to run on this device or in this dtype.
    """
    device = torch.device(device)
    if name != "auto":
        return _make(_source(name), device, dtype)
    refusals = []
    for candidate in _preference(device, dtype, allow_flash, allow_sdpa):
        source = _SOURCES[candidate]
        if source.refusal(device, dtype) is not None:
            continue
        try:
            return _make(source, device, dtype)
        except AttentionError as error:  # installed but unusable: say so, and take the next best
            log.warning("%s", error)
            refusals.append(str(error))
    allowed = [label for label, on in (("flash-attn packages", allow_flash), ("SDPA", allow_sdpa)) if on]
    raise AttentionError(
        f"No attention kernel is left for {_spell(dtype)} on {_spell_device(device)}: allowed are "
        f"{' and '.join(allowed) or 'none'}{''.join(' (' + text + ')' for text in refusals)}. "
        "Switch use_sdpa on, which needs nothing installed."
    )


def get_fp8_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel of self-attention on fp8 numbers, tried out once: FlashAttention-3's, or plain torch on a CPU.

    Raises:
        AttentionError: this device has no such kernel.
    """
    device = torch.device(device)
    source = _FP8_SOURCES[device.type]
    refusal = source.refusal(device, dtype)
    if refusal is not None:
        way = "S" if source.installed() else f"{_GET_FLASH_ATTN_3}, or s"
        raise AttentionError(
            f"fp8_mode linear+attention needs FlashAttention-3 on a Hopper GPU (H100, H200), and can't have it here: "
            f"{refusal.split('. ')[0]}. {way}et fp8_mode to linear."
        )
    try:
        return _make(source, device, dtype)
    except AttentionError as error:
        raise AttentionError(f"{str(error).split('. ')[0]}. Set fp8_mode to linear.") from error


def available_kernels(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the kernels whose package is installed and whose limits admit this device and dtype."""
    device = torch.device(device)
    return tuple(name for name, source in _SOURCES.items() if source.refusal(device, dtype) is None)


def _preference(device: torch.device, dtype: torch.dtype, allow_flash: bool, allow_sdpa: bool) -> tuple[str, ...]:
    """Exact kernels, fastest first. The order on Hopper was measured; the others follow their authors."""
    flash: tuple[str, ...] = ()
    if device.type == "cuda" and dtype in SIXTEEN_BIT:
        major = torch.cuda.get_device_capability(device)[0]
        if major == 9:
            flash = ("flash_attn_3", "flash_attn_4")
        elif major >= 10:
            flash = ("flash_attn_4",)
        if major == 8 or not allow_sdpa:
            flash += ("flash_attn_2",)
    return (flash if allow_flash else ()) + (("sdpa",) if allow_sdpa else ())


# torch's own kernels


def _sdpa_cpu(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if want_lse:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), lse
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None


def _aten_cuda(op: Callable[..., tuple], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Call one of torch's fused kernels, which want `[B, H, S, D]` and a head dimension that divides by 8."""
    head_dim = q.shape[-1]
    if head_dim % 8:
        q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = op(q, k, v, 1 / math.sqrt(head_dim))[:2]
    return out.transpose(1, 2)[..., :head_dim], lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    def op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, want_lse, 0.0, False, False, scale=scale)

    return _aten_cuda(op, q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    def op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)

    return _aten_cuda(op, q, k, v)


def _efficient(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    def op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, want_lse, 0.0, False, scale=scale)

    return _aten_cuda(op, q, k, v)


def _sdpa_cuda(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """cuDNN from Hopper on, where it is torch's fastest kernel; flash before it; efficient for float32."""
    if q.dtype not in SIXTEEN_BIT:
        return _efficient(q, k, v, want_lse)
    major = torch.cuda.get_device_capability(q.device)[0]
    if major >= 9:
        heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        params = torch.backends.cuda.SDPAParams(*heads_first, None, 0.0, False, False)
        if torch.backends.cuda.can_use_cudnn_attention(params):
            return _cudnn(q, k, v, want_lse)
    return (_flash if major >= 8 else _efficient)(q, k, v, want_lse)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    return (_sdpa_cuda if q.is_cuda else _sdpa_cpu)(q, k, v, want_lse)


# packages


def _load_flash_attn_2() -> Forward:
    func = importlib.import_module("flash_attn").flash_attn_func

    def forward(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        if want_lse:
            return func(q, k, v, return_attn_probs=True)[:2]
        return func(q, k, v), None

    return forward


def _load_flash_attn_3() -> Forward:
    call = flash3.load()
    return lambda q, k, v, want_lse: call(q, k, v)


def _load_flash_attn_4() -> Forward:
    func = importlib.import_module("flash_attn.cute").flash_attn_func

    def forward(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        result = func(q, k, v, return_lse=want_lse)
        return result[:2] if isinstance(result, tuple) else (result, None)

    return forward


def _load_sageattn() -> Forward:
    func = importlib.import_module("sageattention").sageattn

    def forward(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        k = k.clone()  # SageAttention 1 smooths the keys in place
        if want_lse:
            return func(q, k, v, tensor_layout="NHD", is_causal=False, return_lse=True)
        return func(q, k, v, tensor_layout="NHD", is_causal=False), None

    return forward


def _load_comfy_kitchen_int8() -> Forward:
    package = importlib.import_module("comfy_kitchen")
    func = package.int8_attention

    def forward(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        return func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2), None

    return forward


def _never() -> bool:
    return False


def _sageattn_has_lse() -> bool:
    """Whether SageAttention returns a log-sum-exp: version 1 ignores `return_lse` in its **kwargs."""
    return "return_lse" in inspect.signature(importlib.import_module("sageattention").sageattn).parameters


def _has_flash_attn_2() -> bool:
    """Whether flash-attn 2 is installed: flash-attn 4 alone makes `flash_attn` a package without an `__init__`."""
    spec = importlib.util.find_spec("flash_attn")
    return spec is not None and spec.origin is not None


def _has_flash_attn_4() -> bool:
    """Whether flash-attn 4's folder exists; `find_spec("flash_attn.cute")` would import flash-attn 2."""
    spec = importlib.util.find_spec("flash_attn")
    if spec is None or not has_module("cutlass"):
        return False
    folders = spec.submodule_search_locations or ()
    return any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders)


def _always() -> bool:
    return True


@dataclass(frozen=True)
class _Source:
    """The package and the abilities of a kernel.

    `absence` says why the package cannot do what it is given, where there is more to say than that the package is not
    installed. `capabilities` are CUDA major versions; empty stands for all. `versions` are major and minor versions
    beside these.
    """

    name: str
    load: Callable[[], Forward]
    dtypes: Callable[[], frozenset[torch.dtype]] = lambda: SIXTEEN_BIT
    installed: Callable[[], bool] = _always
    install: str = ""
    absence: Callable[[str], str | None] = lambda _what: None
    device_types: frozenset[str] = frozenset({"cuda"})
    capabilities: frozenset[int] = frozenset()
    versions: frozenset[tuple[int, int]] = frozenset()
    has_lse: Callable[[], bool] = _always
    lossy: bool = False
    bound: float = 5e-2

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this kernel can't run here, as two sentences; None if it can."""
        if device.type not in self.device_types:
            return (
                f"The attention kernel {self.name} does not run on {device.type}. "
                "Use the attention kernel auto or sdpa there."
            )
        if not self.installed():
            what = f"The attention kernel {self.name}"
            return self.absence(what) or f"{what} is not installed. {self.install}"
        if dtype not in self.dtypes():
            able = " or ".join(sorted(_spell(able) for able in self.dtypes()))
            return (
                f"The attention kernel {self.name} can't compute in {_spell(dtype)}. "
                f"Use {able}, or the attention kernel auto or sdpa."
            )
        if device.type == "cuda" and self.capabilities:
            major, minor = torch.cuda.get_device_capability(device)
            if major not in self.capabilities and (major, minor) not in self.versions:
                return (
                    f"The attention kernel {self.name} does not run on sm_{major}{minor}, which "
                    f"{_spell_device(device)} is. Use the attention kernel auto, which picks one that does."
                )
        return None


_GET_FLASH_ATTN_3 = "Install it with: pip install --no-deps fa3-fwd==0.0.3"

_SOURCES: dict[str, _Source] = {
    source.name: source
    for source in (
        _Source(
            "sdpa",
            load=lambda: _sdpa,
            dtypes=lambda: SIXTEEN_BIT | {torch.float32},
            device_types=frozenset({"cpu", "cuda"}),
        ),
        _Source(
            "sdpa_cudnn",
            load=lambda: _cudnn,
            installed=torch.backends.cudnn.is_available,
            install="Install a torch build with cuDNN 9, or use the attention kernel sdpa_flash.",
            capabilities=frozenset(range(8, 13)),
        ),
        _Source("sdpa_flash", load=lambda: _flash, capabilities=frozenset(range(8, 13))),
        _Source(
            "flash_attn_2",
            load=_load_flash_attn_2,
            installed=_has_flash_attn_2,
            install="Install it with: pip install flash-attn --no-build-isolation",
            capabilities=frozenset(range(8, 13)),
        ),
        _Source(
            "flash_attn_3",
            load=_load_flash_attn_3,
            dtypes=flash3.dtypes,
            installed=flash3.installed,
            install=_GET_FLASH_ATTN_3,
            capabilities=frozenset({9}),
        ),
        _Source(
            "flash_attn_4",
            load=_load_flash_attn_4,
            installed=_has_flash_attn_4,
            install="Install it with: pip install --pre flash-attn-4",
            capabilities=frozenset({9, 10, 11, 12}),
        ),
        _Source(
            "sageattn",
            load=_load_sageattn,
            installed=functools.partial(has_module, "sageattention"),
            install="Install it with: pip install sageattention",
            capabilities=frozenset(range(8, 13)),
            has_lse=_sageattn_has_lse,
            lossy=True,
        ),
        _Source(
            "comfy_kitchen_int8",
            load=_load_comfy_kitchen_int8,
            installed=lambda: kitchen.refusal("") is None,
            install=kitchen.INSTALL,
            absence=kitchen.refusal,
            capabilities=frozenset({8, 9, 10, 12}),
            versions=frozenset({(7, 5)}),
            has_lse=_never,
            lossy=True,
        ),
    )
}

KERNEL_NAMES = ("auto", *_SOURCES)
WITHOUT_LSE = frozenset(name for name, source in _SOURCES.items() if source.has_lse is _never)
"""Kernels that never give a log-sum-exp."""

# Self-attention of fp8_mode, by device type; chosen there alone. e4m3 rounds each number by 2.6 % on average: queries,
# keys, exponentials and values together move the output of normal numbers by about 5 %.
_FP8_BOUND = 8e-2
_FP8_SOURCES = {
    "cuda": replace(
        _SOURCES["flash_attn_3"],
        name="flash_attn_3_fp8",
        load=fp8_attention.load_flash_attn_3,
        dtypes=lambda: SIXTEEN_BIT,
        lossy=True,
        bound=_FP8_BOUND,
    ),
    "cpu": _Source(
        "fp8_reference",
        load=lambda: fp8_attention.reference,
        dtypes=lambda: SIXTEEN_BIT | {torch.float32},
        device_types=frozenset({"cpu"}),
        lossy=True,
        bound=_FP8_BOUND,
    ),
}


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        raise AttentionError(f"There is no attention kernel {name!r}. Use one of {', '.join(KERNEL_NAMES)}.")
    return _SOURCES[name]


def _make(source: _Source, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    refusal = source.refusal(device, dtype)
    if refusal is not None:
        raise AttentionError(refusal)
    try:
        kernel = AttentionKernel(source.name, source.load(), source.has_lse(), source.lossy, source.bound)
    except (ImportError, AttributeError, OSError) as error:
        raise AttentionError(
            f"The attention kernel {source.name} is installed but can't be loaded ({error}). "
            f"{source.install or 'Reinstall torch.'}"
        ) from error
    if device.type == "cuda":
        _try_out(kernel, device, dtype)
    return kernel


# Greatest relative error of the output and absolute error of the log-sum-exp against exact arithmetic. A
# log-sum-exp of about 5 that went through bf16 is off by up to 0.016.
_OUT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
_LSE_TOLERANCE = 2e-3

_tried: set[tuple[str, torch.device, torch.dtype]] = set()


def _try_out(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a kernel with float64 arithmetic on a small input; AttentionError if it is wrong or fails.

    Third-party kernels have returned a zero log-sum-exp, or rounded it to bf16, without a word.
    """
    key = (kernel.name, device, dtype)
    if key in _tried:
        return
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, length, 2, 128, device=device, generator=generator).to(dtype) for length in (160, 96, 96))
    with torch.no_grad():
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
        expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
        try:
            out, lse = kernel.with_lse(q, k, v) if kernel.has_lse else (kernel(q, k, v), None)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise AttentionError(
                f"The attention kernel {kernel.name} fails on {_spell_device(device)} in {_spell(dtype)} "
                f"({error}). Use the attention kernel auto or sdpa."
            ) from error
        out_error = float((out.double() - expected).norm() / expected.norm())
        lse_error = 0.0 if lse is None else float((lse.double() - scores.logsumexp(-1)).abs().max())
    out_limit = kernel.bound if kernel.lossy else _OUT_TOLERANCE[dtype]
    lse_limit = kernel.bound if kernel.lossy else _LSE_TOLERANCE
    if not (out_error <= out_limit and lse_error <= lse_limit):  # NaN must not pass
        raise AttentionError(
            f"The attention kernel {kernel.name} is wrong on {_spell_device(device)} in {_spell(dtype)} "
            f"(output off by {out_error:.1e}, log-sum-exp by {lse_error:.1e}). "
            "Use the attention kernel auto or sdpa, or install another version of its package."
        )
    _tried.add(key)


def _attend_to_nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """The attention to no keys: zeros, and a log-sum-exp of minus infinity, which a merge ignores. torch's CPU kernel
    crashes without keys."""
    batch, length, heads, _ = q.shape
    return torch.zeros_like(q), q.new_full((batch, heads, length), float("-inf"), dtype=torch.float32)


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spell_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
