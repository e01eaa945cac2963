"""Values that nobody picks by hand, for every input of every node. Runs by itself, with stand-ins for ComfyUI:

    python -m testkit.hostile.hostile_values

Each value is either refused in words that name the input, or is one that the input allows. Prints the number of values.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testkit.comfyui import stub
from testkit.tiny import sentences

EXAMPLES = 40
VIDEO, FRAMES, TEXT = (1, 16, 3, 4, 4), (2, 8, 8, 3), (1, 7, 16)
SIZES = {"LATENT": VIDEO, "IMAGE": FRAMES, "CONDITIONING": TEXT}
NODE_CHECKED = ("XDITUSPCONFIG", "WANVIDLORA", "VACEPATH", "VAE", "MODEL,XDITUSPCONFIG", "MODEL")
"""Sockets that the nodes look at themselves."""

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([0, 1, -1, 2**31, -(2**63), 2**64, 10**400, -(10**5000)]),
    st.floats(),
    st.sampled_from([5e-324, 1e308, -0.0]),
    st.text(max_size=20),
    st.sampled_from(["1e400", "\0", "\ud800", "x" * 100_000, "auto ", "cuda\n", "../../etc/passwd", "1e308,1"]),
    st.just([]),
    st.just({}),
    st.just({"samples": None}),
    st.just([["text", {}]]),
    st.just([{"path": ["x"]}]),
    st.just({"path": ""}),
    st.just([[torch.zeros(1), "no mapping"]]),
    st.just(object()),
    st.just(np.int64(2)),
    st.just(np.float32("nan")),
    st.just(np.array(["auto", "cpu"])),
    st.just(torch.zeros(())),
)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """Tensors of this shape and others, of any dtype, with or without odd numbers."""
    size = draw(st.sampled_from([shape, shape[:-1], (*shape, 1), (0, *shape[1:]), (*shape[:2], 0, *shape[3:]), ()]))
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    dtypes += [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
    made = torch.zeros(size, dtype=draw(st.sampled_from(dtypes)))
    number = draw(st.sampled_from([0.0, 0.0, math.nan, math.inf, -math.inf]))
    if made.numel() and made.dtype.is_floating_point and made.dtype.itemsize > 1:
        made.view(-1)[-1] = number
    return made.to("meta") if draw(st.integers(0, 9)) == 0 else made


def values(kind: str) -> st.SearchStrategy[Any]:
    """Values for an input of this type."""
    if kind == "LATENT":
        return anything | st.builds(lambda samples: {"samples": samples}, tensors(VIDEO))
    if kind == "IMAGE":
        return anything | tensors(FRAMES)
    if kind == "CONDITIONING":
        return anything | st.builds(lambda text: [[text, {}]], tensors(TEXT))
    return anything


def allowed(node_input: Any, value: Any) -> bool:
    """Whether an input may have a value, in other words than the product's."""
    kind = node_input.get_io_type()
    if kind == "INT":
        whole = isinstance(value, (int, np.integer)) and type(value) is not bool
        return whole and not value < node_input.min and not value > node_input.max
    if kind == "FLOAT":
        real = type(value) in (int, float, np.float32, np.int64)
        return real and not value < node_input.min and not value > node_input.max and value == value
    if kind == "BOOLEAN":
        return value is True or value is False
    if kind == "STRING":
        return type(value) is str
    if kind == "COMBO":
        return type(value) is str and (node_input.id in ("model", "vace_model") or value in set(node_input.options))
    if value is None:
        return node_input.optional
    if kind == "LATENT":
        return type(value) is dict and _fine(value.get("samples"))
    if kind == "IMAGE":
        return _fine(value) and value.ndim == 4 and value.shape[3] >= 3
    return type(value) is list and bool(value) and all(map(_is_condition, value))


def _is_condition(entry: Any) -> bool:
    return type(entry) is list and _fine(entry[0]) and type(entry[1]) is dict


def _fine(tensor: Any) -> bool:
    if type(tensor) is not torch.Tensor or tensor.device.type == "meta" or tensor.numel() == 0:
        return False
    good = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return good and not bool((tensor.isnan() | tensor.isinf()).any())


def usual(node_input: Any) -> Any:
    """A value that an input allows."""
    kind = node_input.get_io_type()
    if kind == "LATENT":
        return {"samples": torch.zeros(VIDEO)}
    if kind == "IMAGE":
        return torch.zeros(FRAMES)
    if kind == "CONDITIONING":
        return [[torch.zeros(TEXT), {}]]
    if kind == "XDITUSPCONFIG":
        from wan_parallel.nodes.common.settings import USPConfig

        return USPConfig(device="cpu")
    default = getattr(node_input, "default", None)
    return node_input.options[0] if default is None and kind == "COMBO" else default


def check(node: Any, node_input: Any, value: Any) -> None:
    """Give one input of a node a value, the others their usual ones; assert what the node says."""
    from wan_parallel.nodes.common.input_values import checked_values
    from wan_parallel.wanvideo.base.user_error import UserError

    inputs, name = node.define_schema().inputs, node_input.id
    if node_input.get_io_type() == "*":
        return
    looked_at = any(kind in node_input.get_io_type() for kind in NODE_CHECKED)
    if not looked_at and allowed(node_input, value):
        assert checked_values([node_input], {name: value}) == {name: value} or not isinstance(value, (int, float, str))
        return
    if looked_at and (value is None or (type(value) is list and not value)) and node_input.optional:
        return
    try:
        node.execute(**{**{given.id: usual(given) for given in inputs}, name: value})
    except UserError as error:
        text = str(error)
        assert sentences(text) >= 2 and len(text) < 1000 and text.isprintable(), text
        assert looked_at or name in text, text
        text.encode()
    else:
        raise AssertionError("accepted")
    _check_when_queued(node, name, value, looked_at)


async def _result(answer: Awaitable[Any]) -> Any:
    return await answer


def _check_when_queued(node: Any, name: str, value: Any, looked_at: bool) -> None:
    """What is refused when it runs is refused when it is queued, where the node checks the input then."""
    validate = getattr(node, "validate_inputs", None)
    if validate is None or looked_at or value is None or name not in inspect.signature(validate).parameters:
        return
    text = validate(**{name: value})
    if inspect.isawaitable(text):
        text = asyncio.run(_result(text))
    assert isinstance(text, str) and sentences(text) >= 2 and text.isprintable(), text


def cases() -> Iterator[tuple[Any, Any]]:
    """Every input of every node."""
    from wan_parallel.nodes.extension import WanParallelExtension

    for node in asyncio.run(WanParallelExtension().get_node_list()):
        for node_input in node.define_schema().inputs:
            yield node, node_input


def tried(node: Any, node_input: Any) -> int:
    """Try `EXAMPLES` values of an input; returns how many there were."""
    count = 0

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(values(node_input.get_io_type()))
    def each(value: Any) -> None:
        nonlocal count
        count += 1
        check(node, node_input, value)

    each()
    return count


def main() -> None:
    """Try all inputs; the first failure ends the program."""
    stub.install()
    counts = [tried(node, node_input) for node, node_input in cases()]
    print(len(counts), "inputs,", sum(counts), "values")


if __name__ == "__main__":
    main()
