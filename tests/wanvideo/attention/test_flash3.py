"""Which of FlashAttention-3's calls is taken."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from wan_parallel.wanvideo.attention import flash3

SCALES = "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None"
KNOWN = f"Tensor q, Tensor k, Tensor v, {SCALES}, float? softmax_scale=None, bool is_causal=False, int num_splits=0"
names = (f"wan_parallel_flash3_{number}" for number in itertools.count())


@pytest.fixture
def library():
    """Makes a library with an operator `fwd`, which says how it was called; gives the library's name."""
    made = []

    def define(arguments: str, results: str = "(Tensor, Tensor, Tensor, Tensor)") -> tuple[str, list[tuple]]:
        name, calls = next(names), []
        made.append(torch.library.Library(name, "DEF"))
        made[-1].define(f"fwd({arguments}) -> {results}")

        def fwd(*given):
            calls.append(given)
            return given[0].clone(), given[1].clone(), given[2].clone(), given[0].clone()

        made[-1].impl("fwd", fwd, "CPU")
        return name, calls

    yield define
    for each in made:
        each._destroy()


def test_the_operator_is_called_as_the_public_function_would(library):
    name, calls = library(KNOWN)
    q, k, v = (torch.full((1, 2, 3, 64), float(number)) for number in range(3))
    scale = torch.ones(1, 3)
    out, lse = flash3._of_operator(flash3._operator(name))(q, k, v, q_descale=scale, k_descale=scale, v_descale=scale)
    assert torch.equal(out, q)
    assert torch.equal(lse, k)
    (given,) = calls
    assert given[3] is not None
    assert given[6:] == (1 / math.sqrt(64), False, 1)


@pytest.mark.parametrize(
    "arguments, results",
    [
        (KNOWN.replace(", int num_splits=0", ""), "(Tensor, Tensor, Tensor, Tensor)"),
        (KNOWN.replace("Tensor k, Tensor v", "Tensor v, Tensor k"), "(Tensor, Tensor, Tensor, Tensor)"),
        (KNOWN, "Tensor"),
    ],
    ids=["no splits", "another order", "no log-sum-exp"],
)
def test_an_operator_that_is_not_known_is_left_alone(library, arguments, results):
    assert flash3._operator(library(arguments, results)[0]) is None


def test_a_package_without_an_operator():
    assert flash3._operator("wan_parallel_no_such_library") is None


def test_the_public_function_of_an_early_build_always_gives_the_pair():
    forward = flash3._of_function(lambda q, k, v: (q, k, v))
    assert forward(1, 2, 3) == (1, 2)


def test_the_public_function_of_a_late_build_is_asked_for_the_pair():
    forward = flash3._of_function(lambda q, k, v, return_attn_probs=False: (q, k) if return_attn_probs else q)
    assert forward(1, 2, 3) == (1, 2)
