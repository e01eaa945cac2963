"""A sequence shared by several processes gives what one process computes, for every split."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import testkit  # noqa: F401 (registers wan_parallel, also in the processes of a group)
import torch
from testkit import gloo_group, tiny
from wan_parallel.distributed.comm.peer_memory import HostPeerMemory, PeerMemory, SignalValue, Transfer, strided
from wan_parallel.distributed.comm.peer_memory_cuda import open_peer_memory
from wan_parallel.distributed.parallel.exact import exact_attention
from wan_parallel.distributed.parallel.groups import ParallelGroups
from wan_parallel.distributed.parallel.sequence_attention import NativeAttention
from wan_parallel.distributed.parallel.sequence_group import SequenceGroup, join_group
from wan_parallel.distributed.parallel.ulysses_overlap import OverlappedAttention
from wan_parallel.distributed.plan.degrees import ParallelPlan, SequenceDegrees, shares
from wan_parallel.distributed.protocol.specs import PoolSettings
from wan_parallel.distributed.shm import pinned
from wan_parallel.wanvideo.attention.kernels import AttentionKernel, get_kernel
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import grid_of, pad_to_patch, patchify, unpatchify
from wan_parallel.wanvideo.model.model import WanModel

CPU = torch.device("cpu")
FIVE_HEADS = WanConfig(dim=640, ffn_dim=256, num_heads=5, num_layers=2, text_dim=32)

# A world of 4 has all splits of 2 and 4 processes (two groups where a split takes 2), one of 6 those of 3 and 6.
SPLITS = {4: [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2)], 6: [(3, 1), (1, 3), (2, 3), (3, 2), (6, 1), (1, 6)]}


@dataclass(frozen=True)
class Case:
    """One self-attention over a shared sequence."""

    ulysses: int
    ring: int
    tokens: int = 96
    heads: int = 12
    batch: int = 1
    dtype: str = "float32"
    head_dim: int = 32
    overlap: bool = True
    content: str = "normal"
    kernel: str = "sdpa"
    speeds: tuple[int, ...] = ()
    way: str = ""  # "hidden": the exchange hides behind computation; "staged": and is set down on the way

    @property
    def degrees(self) -> SequenceDegrees:
        return SequenceDegrees(self.ulysses, self.ring)

    def inputs(self, first_rank: int) -> tuple[torch.Tensor, ...]:
        """q, k, v [B, tokens, heads, head_dim] of the whole sequence; every group has its own."""
        generator = torch.Generator().manual_seed(first_rank)
        shape = (self.batch, self.tokens, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, self.dtype)) for _ in range(3))
        if self.content == "far below zero":
            # Scores of about -90 and values of 1: a single padded key, whose score is 0, would take everything.
            q, k, v = q.abs() + 4, -k.abs() - 4, torch.ones_like(v)
        return q, k, v


def attention_cases() -> dict[int, list[Case]]:
    """What runs in each world."""
    cases: dict[int, list[Case]] = {}
    for world, splits in SPLITS.items():
        cases[world] = []
        for ulysses, ring in splits:
            even = Case(ulysses, ring)
            uneven = replace(even, tokens=101, heads=7)
            cases[world] += [even, uneven, replace(uneven, batch=2, overlap=False), replace(uneven, batch=2, tokens=50)]
            cases[world] += [replace(uneven, tokens=tokens) for tokens in {1, ulysses * ring - 1}]
            cases[world] += [replace(uneven, content="far below zero")]
            cases[world] += [replace(uneven, tokens=509, heads=6, head_dim=64, dtype="bfloat16")]
            unlike, tail = UNLIKE[: ulysses * ring], (1,) * (ulysses * ring - 1)
            cases[world] += [replace(uneven, heads=12, speeds=speeds) for speeds in (unlike, (1000, *tail))]
        shared_by_heads = [case for case in cases[world] if case.ring == 1 and case.overlap]
        cases[world] += [replace(case, way=way) for case in shared_by_heads for way in ("hidden", "staged")]
    loud = Case(1, 4, tokens=1021, heads=4, head_dim=64, dtype="bfloat16")
    cases[4] += [loud, *(replace(loud, kernel=kernel) for kernel in BROKEN_KERNELS)]
    return cases


UNLIKE = (5, 2, 3, 8, 1, 4)
BROKEN_KERNELS = ("log-sum-exp rounded to bf16", "log-sum-exp of zero")


def make_kernel(case: Case) -> AttentionKernel:
    kernel = get_kernel("sdpa", CPU, getattr(torch, case.dtype))
    if case.kernel == "sdpa":
        return kernel

    def forward(q, k, v, want_lse):  # what other libraries do (their ring is silently wrong)
        out, lse = kernel.forward(q, k, v, want_lse)
        return out, torch.zeros_like(lse) if "zero" in case.kernel else lse.bfloat16().float()

    return AttentionKernel(case.kernel, forward)


class StagedOnCPU(HostPeerMemory):
    """Sets transfers down where `StagedPeerMemory` does between GPUs, in the second half of the memory."""

    hops = 2

    def _make(self, nbytes: int) -> None:
        super()._make(2 * nbytes)

    def _put(self, transfers: Sequence[Transfer], values: Sequence[int], tensor: torch.Tensor) -> None:
        set_down = [x if x.rank == self.group_rank else self._set_down(x) for x in transfers]
        super()._put(set_down, values, tensor)

    def _wait_signals(self, transfers: Sequence[Transfer], words: Sequence[SignalValue]) -> None:
        super()._wait_signals(transfers, words)
        own = self._segment.data[self.group_rank]
        for transfer in transfers:
            if transfer.rank != self.group_rank:
                there = strided(own, transfer.shape, transfer.offset, transfer.strides_there)
                down = self._set_down(transfer)
                there.copy_(strided(own, transfer.shape, down.offset, down.strides_there))

    def _set_down(self, transfer: Transfer) -> Transfer:
        _, rows, width = transfer.shape
        return replace(transfer, offset=self.nbytes + transfer.packed, strides_there=(rows * width, width))


@functools.cache
def open_memory(degrees: SequenceDegrees, rank: int, world: int, way: str) -> PeerMemory:
    group = joined(degrees, rank, world).ulysses
    memory = open_peer_memory(group, CPU) if way == "hidden" else StagedOnCPU(group, CPU)
    # so that slices of heads are uneven, and not alike
    memory.processors = tuple(3 + place for place in range(memory.ranks))
    return memory


@functools.cache
def joined(degrees: SequenceDegrees, rank: int, world: int) -> SequenceGroup:
    return join_group(degrees, rank, [tuple(range(i, i + degrees.ranks)) for i in range(0, world, degrees.ranks)])


def run_attention(rank: int, world: int, cases: list[Case]) -> gloo_group.Results:
    """On each process: this rank's part of every case."""
    results = {}
    for case in cases:
        group = replace(joined(case.degrees, rank, world), speeds=case.speeds)
        start, stop = group.shard(case.tokens)
        q, k, v = (x[:, start:stop] for x in case.inputs(group.ranks[0]))
        if case.way:
            memory = open_memory(case.degrees, rank, world, case.way)
            attend = OverlappedAttention(group, make_kernel(case), case.tokens, case.heads, memory)
            for block in range(rank % 3, rank % 3 + 3):  # ranks that are ahead must not disturb the others
                time.sleep(block % 3 / 1000)
                attend(q + block, k - block, v * block)
            attend.announce("v", v)
            attend.announce("k", k)
        else:
            attend = NativeAttention(group, make_kernel(case), case.tokens, case.heads, case.overlap)
        results[str(case)] = attend(q, k, v).clone()  # it lies where that of the next block will
    return results


@dataclass(frozen=True)
class ModelCase:
    """One forward on a shared sequence."""

    ulysses: int
    ring: int
    size: tuple[int, int, int] = (3, 6, 10)
    batch: int = 1
    by_frame: bool = False
    slice_tokens: int = 0
    compute: str = "float32"

    def inputs(self) -> tiny.Inputs:
        given = tiny.inputs(FIVE_HEADS, self.size, self.batch)
        frames = torch.linspace(0, 900, self.batch * self.size[0]).view(self.batch, -1)
        return given._replace(timestep=frames) if self.by_frame else given

    def model(self, path: str) -> WanModel:
        return WanModel.from_checkpoint(
            path, compute_dtype=getattr(torch, self.compute), slice_tokens=self.slice_tokens
        )


def model_cases() -> dict[int, list[ModelCase]]:
    cases: dict[int, list[ModelCase]] = {}
    for world, splits in SPLITS.items():
        cases[world] = []
        for ulysses, ring in splits:
            if ulysses > FIVE_HEADS.num_heads:
                continue
            plain = ModelCase(ulysses, ring)
            cases[world] += [plain, replace(plain, size=(2, 7, 5), batch=2, by_frame=True, slice_tokens=4)]
            cases[world] += [replace(plain, size=(1, 2, 4))]  # 2 tokens
            cases[world] += [replace(plain, compute="bfloat16", size=(3, 16, 16))]
    return cases


def run_model(rank: int, world: int, path: str, cases: list[ModelCase]) -> gloo_group.Results:
    """On each process: this rank's tokens of every case."""
    results = {}
    for case in cases:
        model = case.model(path)
        group = joined(SequenceDegrees(case.ulysses, case.ring), rank, world)
        x, timestep, context = case.inputs()
        grid = grid_of(x)
        part = slice(*group.shard(grid.tokens))
        tokens = patchify(pad_to_patch(x))[:, part.start : part.stop]
        attend = NativeAttention(group, model.kernel, grid.tokens, model.config.num_heads)
        results[str(case)] = model.transform(tokens, grid, part, timestep, context, attend)
        if case.ring == 1:
            memory = open_memory(group.degrees, rank, world, "hidden")
            attend = OverlappedAttention(group, model.kernel, grid.tokens, model.config.num_heads, memory)
            for _ in range(2):
                results[f"{case} hidden"] = model.transform(tokens, grid, part, timestep, context, attend)
    return results


def run_without_room(rank: int, world: int, path: str) -> gloo_group.Results:
    """On each process: a forward where the host has no memory for what the ranks send each other."""
    case = ModelCase(world, 1)
    model, (x, timestep, context) = case.model(path), case.inputs()
    parallel, grid = (
        ParallelGroups(rank, PoolSettings(ParallelPlan(world, ulysses_degree=world), "cpu"), CPU),
        grid_of(x),
    )
    parallel.join(model.config.num_heads)
    (group,) = parallel.groups.values()
    had = len(parallel.peer_memories)
    with mock.patch.object(pinned, "host_room", lambda: 0):
        attend = exact_attention(parallel, group, model, grid, 1, model.self_kernel)
    part = slice(*group.shard(grid.tokens))
    out = model.transform(patchify(pad_to_patch(x))[:, part], grid, part, timestep, context, attend)
    return {"without room": out, "peer_memories": torch.tensor([had, len(parallel.peer_memories)])}


# Each world starts once and runs all of its cases.


def run_all(rank: int, world: int, path: str) -> gloo_group.Results:
    results = run_attention(rank, world, attention_cases()[world]) | run_model(rank, world, path, model_cases()[world])
    return results | (run_without_room(rank, world, path) if world == 4 else {})


@pytest.fixture(scope="module")
def five_heads(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("five") / "five.safetensors", FIVE_HEADS)


@pytest.fixture(scope="module")
def world_of_4(tmp_path_factory, five_heads) -> list[gloo_group.Results]:
    return gloo_group.run(4, run_all, tmp_path_factory.mktemp("gloo"), five_heads)


@pytest.fixture(scope="module")
def world_of_6(tmp_path_factory, five_heads) -> list[gloo_group.Results]:
    return gloo_group.run(6, run_all, tmp_path_factory.mktemp("gloo"), five_heads)


@pytest.fixture
def results(request, world) -> list[gloo_group.Results]:
    """What the processes of the test's world computed, by rank."""
    return request.getfixturevalue(f"world_of_{world}")


# Self-attention.


def whole_outputs(results: list[gloo_group.Results], case: Case) -> list[torch.Tensor]:
    """The output over the whole sequence, of every group."""
    parts = [rank[str(case)] for rank in results]
    ranks = case.degrees.ranks
    lengths = shares(case.tokens, ranks, case.speeds)
    for index, part in enumerate(parts):
        assert part.shape == (case.batch, lengths[index % ranks], case.heads, case.head_dim)
        assert part.dtype == getattr(torch, case.dtype)
    return [torch.cat(parts[first : first + ranks], dim=1) for first in range(0, len(parts), ranks)]


def exact(case: Case, group: int) -> torch.Tensor:
    """Attention in float64."""
    q, k, v = (x.double() for x in case.inputs(group * case.degrees.ranks))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(case.head_dim)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def worst_error(results: list[gloo_group.Results], case: Case) -> float:
    outputs = whole_outputs(results, case)
    return max(tiny.relative_error(out, exact(case, group)) for group, out in enumerate(outputs))


def error_of_one_process(case: Case) -> float:
    kernel = get_kernel("sdpa", CPU, getattr(torch, case.dtype))
    return tiny.relative_error(kernel(*case.inputs(0)), exact(case, 0))


def parameters(choose: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """One test for each chosen case."""
    chosen = [(world, case) for world, cases in attention_cases().items() for case in cases if choose(case)]
    names = [
        f"ulysses {c.ulysses} x ring {c.ring}, {c.tokens} tokens, {c.heads} heads, batch {c.batch}"
        f"{', speeds ' if c.speeds else ''}{':'.join(map(str, c.speeds))}{c.way and ', '}{c.way}"
        for _, c in chosen
    ]
    return pytest.mark.parametrize("world, case", chosen, ids=names)


@parameters(lambda case: case.dtype == "float32" and case.content == "normal")
def test_every_split_gives_exact_attention(results, case):
    assert worst_error(results, case) <= 1e-6


@parameters(lambda case: case.content == "far below zero")
def test_no_padding_takes_part_in_the_softmax(results, case):
    for out in whole_outputs(results, case):
        assert torch.allclose(out, torch.ones_like(out), atol=1e-6)


@parameters(lambda case: case.dtype == "bfloat16" and case.kernel == "sdpa")
def test_a_split_costs_hardly_any_precision_in_bf16(results, case):
    # A ring rounds the output of each block to bf16 and the merged one again: 1.2 times, however long the ring.
    assert worst_error(results, case) <= (1.05 if case.ring == 1 else 1.3) * error_of_one_process(case)


@parameters(lambda case: case.kernel in BROKEN_KERNELS)
def test_a_log_sum_exp_of_less_than_fp32_would_be_noticed(results, case):
    assert worst_error(results, case) > 1.5 * error_of_one_process(case)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_yunchangs_own_kernel_has_no_log_sum_exp_which_is_why_it_is_not_used(dtype):
    from yunchang.kernels.attention import pytorch_attn_forward

    q, k, v = Case(1, 1, dtype=dtype).inputs(0)
    assert not pytorch_attn_forward(q, k, v, op_type="math")[1].any()
    assert make_kernel(Case(1, 1, dtype=dtype)).with_lse(q, k, v)[1].all()


# The whole model.


def model_outputs(results: list[gloo_group.Results], case: ModelCase) -> list[torch.Tensor]:
    parts = [rank[str(case)] for rank in results]
    ranks, x = case.ulysses * case.ring, case.inputs().x
    wholes = (torch.cat(parts[first : first + ranks], dim=1) for first in range(0, len(parts), ranks))
    return [unpatchify(whole, grid_of(x), tuple(x.shape[-3:])) for whole in wholes]


def model_parameters(compute: str) -> pytest.MarkDecorator:
    chosen = [(world, case) for world, cases in model_cases().items() for case in cases if case.compute == compute]
    names = [f"ulysses {c.ulysses} x ring {c.ring}, size {c.size}, batch {c.batch}" for _, c in chosen]
    return pytest.mark.parametrize("world, case", chosen, ids=names)


@model_parameters("float32")
def test_the_model_gives_the_same_on_one_process_and_on_several(results, five_heads, case):
    expected = case.model(five_heads)(*case.inputs())
    for out in model_outputs(results, case):
        assert tiny.relative_error(out, expected) <= 1e-6


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", SPLITS)
def test_a_hidden_exchange_changes_nothing(results, world, compute):
    cases = [case for case in model_cases()[world] if case.ring == 1 and case.compute == compute]
    assert cases
    for case, rank in itertools.product(cases, results):
        hidden, plain = rank[f"{case} hidden"], rank[str(case)]
        if case.batch == 1:
            assert torch.equal(hidden, plain)
        else:  # the output lies otherwise in memory, and a product of it rounds otherwise
            assert plain.numel() == 0 or tiny.relative_error(hidden, plain) <= 1e-6


def test_without_host_memory_for_the_exchange_it_goes_another_way(world_of_4):
    """On all ranks, and the peer memory is gone."""
    for rank in world_of_4:
        assert rank["peer_memories"].tolist() == [1, 0]
        assert torch.equal(rank["without room"], rank[str(ModelCase(4, 1))])


@model_parameters("bfloat16")
def test_the_model_is_as_precise_in_bf16_on_several_processes_as_on_one(results, five_heads, case):
    precise = replace(case, compute="float32").model(five_heads)(*case.inputs())
    alone = tiny.relative_error(case.model(five_heads)(*case.inputs()), precise)
    for out in model_outputs(results, case):
        assert tiny.relative_error(out, precise) <= 1.2 * alone
