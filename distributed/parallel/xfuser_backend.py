"""The xfuser path: self-attention over a shared sequence by xDiT's process groups and its USP attention.

Follows xfuser 0.7.0, `core/distributed/parallel_state.py` and `model_executor/layers/usp.py`. The attention
kernel inside is this pack's: xfuser finds fewer packages, and this pack's kernels have a tested log-sum-exp.

xfuser is imported when its groups are made, in a GPU worker, and nowhere else: it loads about 3,000 modules,
needs triton, fails without an accelerator, starts CUDA and logs at DEBUG to stdout.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ...wanvideo.attention.kernels import AttentionKernel
from ...wanvideo.base.user_error import UserError
from ..comm import timing
from ..plan.degrees import SequenceDegrees

log = logging.getLogger(__name__)

INSTALL = "Run ./install_xdit_usp.sh --with-xfuser, or set usp_backend to native, which needs no xfuser."
_COLLECTIVES = "nccl"
_GROUP_NAMES = ("_MODEL_REPLICA", "_DP", "_CFG", "_PP", "_SP", "_TP", "_FS", "_VAE", "_DIT")


class BackendError(UserError, RuntimeError):
    """xfuser is missing, can't be set up, or can't do what is asked. The text says why and what to do."""


def installed() -> bool:
    """Whether xfuser is installed; imports nothing."""
    return importlib.util.find_spec("xfuser") is not None


def refusal(kernel: AttentionKernel, degrees: SequenceDegrees, tokens: int, heads: int) -> str | None:
    """Why xfuser can't spread this sequence, as two sentences; None if it can.

    Args:
        tokens: length of the whole sequence.
        heads: heads of the model.
    """
    if heads % degrees.ulysses:
        return (
            f"xfuser shares heads evenly, and {heads} heads do not divide by Ulysses {degrees.ulysses}. "
            "Set usp_backend to native, which shares them unevenly, or choose another ulysses_degree."
        )
    if tokens % degrees.ranks:
        return (
            f"xfuser shares tokens evenly, and {tokens} tokens do not divide by {degrees.ranks} GPUs. "
            "Set usp_backend to native, which shares them unevenly."
        )
    if degrees.ring > 1 and not kernel.has_lse:
        return (
            f"The attention kernel {kernel.name} gives no log-sum-exp, which a ring needs. "
            "Set ring_degree to 1 or pick another attention kernel."
        )
    return None


@dataclass(frozen=True)
class XfuserGroup:
    """The process groups of one pair of degrees, as xfuser keeps them in its module globals.

    xfuser holds one set at a time; the workers need one for each way they share GPUs, so sets are kept here
    and put in place before use. Shard i of a sequence belongs to rank `first_rank + i`, Ulysses groups are
    runs of ranks: the same layout as the native path has.
    """

    degrees: SequenceDegrees
    first_rank: int
    coordinators: dict[str, Any]
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    runtime: Any = field(repr=False)

    @property
    def ranks(self) -> range:
        """The ranks of a sequence."""
        return range(self.first_rank, self.first_rank + self.degrees.ranks)

    def put_in_place(self) -> None:
        """Let xfuser's functions use the groups of this object from now on."""
        xfuser = _modules()
        vars(xfuser.parallel_state).update(self.coordinators)
        xfuser.process_group.ULYSSES_PG, xfuser.process_group.RING_PG = self.ulysses, self.ring
        xfuser.runtime_state._RUNTIME = self.runtime


class XfuserAttention:
    """Self-attention over the shards of `group` through xfuser's USP.

    Args:
        tokens: length of the whole sequence, divisible by the ranks of the group.
        heads: heads of the model, divisible by the Ulysses degree.

    Raises:
        BackendError: xfuser can't spread this sequence (see `refusal`).
    """

    def __init__(self, group: XfuserGroup, kernel: AttentionKernel, tokens: int, heads: int):
        reason = refusal(kernel, group.degrees, tokens, heads)
        if reason is not None:
            raise BackendError(reason)
        self.group = group
        self._usp = _modules().usp
        self._backend = _register(kernel)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, n, heads, head_dim] of this rank's tokens; returns their attention output."""
        self.group.put_in_place()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with timing.measure_wait(timing.USP, self.group.ranks):
            return self._usp(q, k, v, backend=self._backend).transpose(1, 2)


def join_group(degrees: SequenceDegrees, device: torch.device) -> XfuserGroup:
    """Make xfuser's process groups on the initialised default group (a collective call of all ranks).

    The ranks that `degrees` does not use up are data-parallel groups. Groups are made once for each pair of
    degrees and kept until `teardown`.

    Raises:
        BackendError: xfuser is missing or broken, or set up other degrees than asked for.
    """
    if device.type != "cuda":
        raise BackendError("xfuser runs on GPUs alone. Set usp_backend to native for the CPU.")
    if degrees not in _groups:
        _groups[degrees] = _make_group(degrees, device)
    _groups[degrees].put_in_place()
    return _groups[degrees]


def teardown() -> None:
    """Destroy all of xfuser's process groups; the default group stays. A collective call of all ranks."""
    if not _groups:
        return
    xfuser = _modules()
    for group in _groups.values():
        group.put_in_place()
        xfuser.parallel_state.destroy_model_parallel()
        for process_group in (group.ulysses, group.ring, group.coordinators["_DIT"]):
            dist.destroy_process_group(process_group)
    _groups.clear()
    _empty_place(xfuser)
    if xfuser.parallel_state._WORLD is not None:
        xfuser.parallel_state._WORLD.destroy()
        xfuser.parallel_state._WORLD = None


_groups: dict[SequenceDegrees, XfuserGroup] = {}


def _make_group(degrees: SequenceDegrees, device: torch.device) -> XfuserGroup:
    xfuser = _modules()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % degrees.ranks:
        raise BackendError(
            f"xfuser needs groups of the same size, and {world_size} GPUs do not divide into groups of "
            f"{degrees.ranks}. Set usp_backend to native, or choose another data_parallel_size."
        )
    _empty_place(xfuser)
    local_rank = torch.cuda.current_device() if device.index is None else device.index
    try:
        with _unbound_default_group():
            xfuser.parallel_state.init_distributed_environment(
                world_size=world_size, rank=rank, local_rank=local_rank, backend=_COLLECTIVES
            )
            xfuser.parallel_state.initialize_model_parallel(
                data_parallel_degree=world_size // degrees.ranks,
                sequence_parallel_degree=degrees.ranks,
                ulysses_degree=degrees.ulysses,
                ring_degree=degrees.ring,
                backend=_COLLECTIVES,
            )
        runtime = _make_runtime(xfuser, degrees, world_size // degrees.ranks)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise BackendError(
            f"xfuser could not set up {degrees} on {world_size} GPUs ({error}). Set usp_backend to native."
        ) from error
    group = XfuserGroup(
        degrees,
        rank // degrees.ranks * degrees.ranks,
        {name: getattr(xfuser.parallel_state, name) for name in _GROUP_NAMES},
        xfuser.process_group.ULYSSES_PG,
        xfuser.process_group.RING_PG,
        runtime,
    )
    _check_read_back(xfuser, group)
    return group


@contextmanager
def _unbound_default_group() -> Iterator[None]:
    """Let torch forget the default group's device while xfuser makes its groups.

    If torch knows the device, it connects every new group at once by splitting the default group. xfuser makes about
    twenty groups, of which two or three are used, and says that its own groups break when they are made so
    (parallel_state.py).
    """
    default = dist.group.WORLD
    assert default is not None
    device, default.bound_device_id = default.bound_device_id, None
    try:
        yield
    finally:
        default.bound_device_id = device


def _make_runtime(xfuser: _Modules, degrees: SequenceDegrees, data_parallel: int) -> object:
    """The state object that USP reads the degrees from.

    xfuser makes a full state for its own pipelines only, and its state for other programs knows no degree but 1; so
    the base class of both is filled by hand.
    """
    arguments = xfuser.arguments(
        ulysses_degree=degrees.ulysses,
        ring_degree=degrees.ring,
        data_parallel_degree=data_parallel,
        attention_backend="SDPA_FLASH",  # never called: our kernel is named with each call
    )
    module = xfuser.runtime_state
    runtime = object.__new__(module.ExternalRuntimeState)
    module.RuntimeState.__init__(runtime, arguments.create_config()[0])
    return runtime


def _check_read_back(xfuser: _Modules, group: XfuserGroup) -> None:
    """Check that xfuser has the degrees asked for: where it finds its attention missing, it silently takes degree 1."""
    state = xfuser.parallel_state
    got = SequenceDegrees(state.get_ulysses_parallel_world_size(), state.get_ring_parallel_world_size())
    ranks = list(state.get_sp_group().ranks)
    expected = list(group.ranks)
    if got != group.degrees or ranks != expected:
        raise BackendError(
            f"xfuser set up {got} over ranks {ranks} where {group.degrees} over {expected} was asked for. "
            "Set usp_backend to native, or install yunchang==0.6.4."
        )


def _empty_place(xfuser: _Modules) -> None:
    """Let xfuser forget the groups that it holds, as it refuses to make further ones beside them."""
    vars(xfuser.parallel_state).update(dict.fromkeys(_GROUP_NAMES))
    xfuser.runtime_state._RUNTIME = None


def _register(kernel: AttentionKernel) -> str:
    """Offer our kernel to USP under a name of its own. USP calls it with `[B, H, S, D]`."""
    xfuser = _modules()
    name = f"wan_parallel_{kernel.name}"

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_unused: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with timing.computing():
            if xfuser.parallel_state.get_ring_parallel_world_size() == 1:
                return kernel(q, k, v).transpose(1, 2), None
            out, lse = kernel.with_lse(q, k, v)
            return out.transpose(1, 2), lse

    xfuser.attention_functions[name] = attend
    return name


@dataclass(frozen=True)
class _Modules:
    """The modules and functions of xfuser and yunchang that this module uses."""

    parallel_state: Any  # a module whose globals are set
    runtime_state: Any
    arguments: type
    attention_functions: dict
    usp: Callable[..., torch.Tensor]
    process_group: Any


_imported: list[_Modules] = []


def _modules() -> _Modules:
    """Import xfuser, once. Raises BackendError where it is missing, broken or too old."""
    if not _imported:
        _imported.append(_import())
    return _imported[0]


def _import() -> _Modules:
    if not installed():
        raise BackendError(f"xfuser is not installed. {INSTALL}")
    try:
        with _quietly():
            parallel_state = importlib.import_module("xfuser.core.distributed.parallel_state")
            usp = importlib.import_module("xfuser.model_executor.layers.usp")
            modules = _Modules(
                parallel_state,
                importlib.import_module("xfuser.core.distributed.runtime_state"),
                importlib.import_module("xfuser.config.args").xFuserArgs,
                importlib.import_module("xfuser.core.distributed.attention_backend").ATTENTION_FUNCTION_REGISTRY,
                usp.USP,
                importlib.import_module("yunchang.globals").PROCESS_GROUP,
            )
    except (ImportError, AttributeError, NotImplementedError, RuntimeError, OSError) as error:
        raise BackendError(f"xfuser is installed but can't be imported ({error}). {INSTALL}") from error
    if "backend" not in inspect.signature(modules.usp).parameters:
        raise BackendError(f"This version of xfuser is too old for the xfuser path. {INSTALL}")
    return modules


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep xfuser off stdout: at its import it logs everything to stdout, and to no handler of the root logger."""
    level = os.environ.get("LOG_LEVEL")
    os.environ["LOG_LEVEL"] = "error"  # xfuser reads this name, and makes its handlers of it
    try:
        yield
    finally:
        if level is None:
            del os.environ["LOG_LEVEL"]
        else:
            os.environ["LOG_LEVEL"] = level
        for name in list(logging.root.manager.loggerDict):
            if name == "xfuser" or name.startswith("xfuser."):
                _hand_to_root(logging.getLogger(name))


def _hand_to_root(logger: logging.Logger) -> None:
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler) and getattr(handler, "stream", None) is sys.stdout:
            logger.removeHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = True
