"""One graph with the stock loader and with ours: what both give, compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import (
    conditions,
    ksampler,
    link,
    pool_model,
    stock_model,
    video,
)
from testkit.tiny import relative_error

EXACT = 1e-5  # relative error
Loader = Callable[..., dict]


def sampled(server: ComfyServer, graph: dict, output: str = "sampler") -> torch.Tensor:
    return server.sample(graph, link(output))


def assert_same(server: ComfyServer, graph: Callable[[Loader], dict], output: str = "sampler") -> torch.Tensor:
    """`graph` gives the nodes for a loader; both loaders must give the same latent. Returns the stock one."""
    native = sampled(server, graph(stock_model), output)
    pool = sampled(server, graph(pool_model), output)
    assert native.isfinite().all() and native.std() > 0.1
    error = relative_error(pool, native)
    print(f"relative error {error:.1e}")
    assert error <= EXACT
    return native


def plain(loader: Loader, **sampler: object) -> dict:
    return {**loader(), **conditions(), **video(), **ksampler(**sampler)}
