"""The attention overrides of ComfyUI's own nodes are read, alone and one on top of the other; others are refused."""

from __future__ import annotations

import pytest
import torch
from testkit import stock_attention as stock
from testkit.stock_attention import SparseAttnPatch, kernel_override, sparse_override
from testkit.tiny import sentences
from wan_parallel.nodes.common.refusals import NotOnWorkers
from wan_parallel.nodes.model.attention_override import SPARSE, SparseWindow, attention_choice
from wan_parallel.wanvideo.base.attention_choice import AttentionChoice, SparseSettings

HOOK = "optimized_attention_override"
SIGMAS = torch.tensor([0.7, 0.7])


def sigma_of(percent: float) -> float:
    """Of a sampling with a shift of 3."""
    return 3 * (1 - percent) / (1 + 2 * (1 - percent))


def read(override: object = None, **options: object) -> AttentionChoice:
    return attention_choice({HOOK: override, **options}, sigma_of)


def test_no_override_leaves_attention_to_the_model():
    assert attention_choice({}, sigma_of) == read(None, sigmas=SIGMAS) == AttentionChoice()


def test_the_settings_of_the_stock_node_are_read():
    patch = SparseAttnPatch(tau=1.0, dense_blocks={4, 0, 1}, extra_tokens=64, sigma_end=0.2, min_tokens=512)
    choice = read(sparse_override(patch), sigmas=SIGMAS)
    assert choice.sparse == SparseSettings(1.0, 0.0, 64, 0.9, 0.2, (0, 1, 4), 512)
    assert choice.sigma == pytest.approx(0.7) and choice.kernel == ""
    kept = read(sparse_override(SparseAttnPatch(topk_ratio=0.1))).sparse
    assert kept.keep == 0.1 and kept.extra_tokens == 256


@pytest.mark.parametrize(
    "function, kernel",
    [(stock.attention_pytorch, "sdpa"), (stock.attention_comfy_kitchen_int8, "comfy_kitchen_int8")],
)
def test_the_dense_kernel_of_the_stock_node_is_read_alone_and_below_sparse_attention(function, kernel):
    assert read(kernel_override(function), sigmas=SIGMAS) == AttentionChoice(kernel=kernel)
    both = read(sparse_override(SparseAttnPatch(), kernel_override(function)))
    assert both.kernel == kernel and both.sparse == SparseSettings(sigma_start=0.9)


def test_a_setting_that_changes_between_prompts_is_read_anew():
    patch = SparseAttnPatch()
    override = sparse_override(patch)
    before = read(override).sparse.tau
    patch.tau = 2.0
    assert (before, read(override).sparse.tau) == (1.3, 2.0)


def test_our_own_node_counts_in_the_sigmas_of_the_model_that_is_sampled():
    window = SparseWindow(SparseSettings(keep=0.1), 0.2, 1.0)
    choice = read(**{SPARSE: window, "sigmas": SIGMAS})
    assert choice.sparse == SparseSettings(keep=0.1, sigma_start=sigma_of(0.2), sigma_end=0.0)
    below = read(kernel_override(stock.attention_pytorch), **{SPARSE: window})
    assert below.kernel == "sdpa" and below.sparse is not None and below.sigma is None


def _another(*_args):
    return None


class _OfAnotherVersion:
    """A patch that keeps other settings."""

    def __init__(self):
        self.threshold = 1.0


_OfAnotherVersion.__name__ = "SparseAttnPatch"


@pytest.mark.parametrize(
    "override, options, named",
    [
        (_another, {}, "_another"),
        (object(), {}, "object"),
        (lambda *_args: None, {}, "lambda"),
        (kernel_override(_another), {}, "_another"),
        (sparse_override(SparseAttnPatch(), _another), {}, "_another"),
        (sparse_override(SparseAttnPatch(), kernel_override(_another)), {}, "_another"),
        (sparse_override(SparseAttnPatch(vsa=True)), {}, "vsa"),
        (sparse_override(_OfAnotherVersion()), {}, "lacks the settings tau, topk_ratio"),
        (sparse_override(SparseAttnPatch(), sparse_override(SparseAttnPatch())), {}, "Two Model Sparse Attention"),
        (sparse_override(SparseAttnPatch()), {SPARSE: SparseWindow(SparseSettings(), 0, 1)}, "Remove one of them"),
    ],
)
def test_what_is_not_known_or_cannot_be_joined_is_refused(override, options, named):
    with pytest.raises(NotOnWorkers, match=named) as refusal:
        read(override, **options)
    assert sentences(str(refusal.value)) == 2
