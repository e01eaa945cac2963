"""Layers beside those of every Wan model, which hear or see something: where they lie, and what they give there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from testkit import gloo_group, infinitetalk_files, tiny, worker_group
from wan_parallel.distributed.parallel.model_division import check_plan, held_parameters
from wan_parallel.distributed.parallel.tensor import TensorShard
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.plan.placement import SLOTS, PlacementError, choose_placement, demand_of, needed_bytes
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.weights.block_store import BlockStore
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.distributed.weights.offload import BlockOffloader
from wan_parallel.wanvideo.attention.kernels import get_kernel
from wan_parallel.wanvideo.base.conditioning import Conditioning
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.lora import LowRank
from wan_parallel.wanvideo.model.model import model_class
from wan_parallel.wanvideo.quant.formats.fp8 import Fp8Weight
from wan_parallel.wanvideo.quant.quantized import Weight
from wan_parallel.wanvideo.variants.infinitetalk import InfiniteTalk

SIDES = {
    "talk": (".audio_cross_attn.", ".norm_x."),
    "humo": (".audio_cross_attn_wrapper.",),
    "animate": ("face_adapter.",),
    "s2v": ("audio_injector.",),
    "dancer": ("music_injector.",),
}
CONFIGS = {
    "talk": tiny.INFINITETALK,
    "humo": tiny.HUMO,
    "animate": tiny.ANIMATE,
    "s2v": tiny.S2V,
    "dancer": replace(tiny.WANDANCER, num_layers=5),
}
WAYS = {
    "whole": (ParallelPlan(2), "off", "off"),
    "shared": (ParallelPlan(2), "on", "off"),
    "in host memory": (ParallelPlan(2), "off", "on"),
    "in stages, shared": (ParallelPlan(2, pipeline_parallel=2), "on", "off"),
    "tensor": (ParallelPlan(2, tensor_parallel=2), "off", "off"),
}


@dataclass(frozen=True)
class Case:
    """One forward."""

    name: str
    way: str

    @property
    def config(self) -> WanConfig:
        return CONFIGS[self.name]

    @property
    def plan(self) -> ParallelPlan:
        return WAYS[self.way][0]

    def __str__(self) -> str:
        return f"{self.name}, {self.way}"

    def job(self, files: dict[str, tuple[str, str]]) -> worker_group.Job:
        (path, module), (plan, shard, offload) = files[self.name], WAYS[self.way]
        spec = ModelSpec(path, "fp32", "fp32", shard_weights=shard, offload=offload, module=module, slice_tokens=20)
        return worker_group.Job(plan, spec, self.given, conditioning=self.conditioning)

    @property
    def given(self) -> tiny.Inputs:
        return tiny.inputs(self.config, (3, 6, 10), batch=2)

    @property
    def conditioning(self) -> Conditioning:
        conditioning = tiny.conditioning(self.config, self.given.x)
        return replace(conditioning, subject=None, motion_frames=None)  # no context tokens

    def sizes(self, sides: bool) -> dict[str, int]:
        """Bytes of the tensors that run, of side layers or of all others."""
        shapes = {name: shape for name, shape in self.config.shapes().items() if runs(name, self.config)}
        return {n: 4 * math.prod(s) for n, s in shapes.items() if any(part in n for part in SIDES[self.name]) == sides}


def runs(name: str, config: WanConfig) -> bool:
    """Whether a tensor does not act behind a block that the tiny model lacks."""
    place = config.video_block_number(name)
    return place is None or place < config.num_layers


def cases() -> Iterator[Case]:
    for name in CONFIGS:
        yield from (Case(name, way) for way in WAYS)


CASES = list(cases())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """The file of each model, and that of the layers that come apart from it."""
    folder, paths = tmp_path_factory.mktemp("sides"), {}
    for name, config in CONFIGS.items():
        weights, module = tiny.random_weights(config), ""
        if name == "talk":
            path = folder / "layers.safetensors"
            module = infinitetalk_files.write_patch(path, config, dtype=torch.float32, blocks=2)
            weights = {key: weight for key, weight in weights.items() if not infinitetalk_files.is_infinitetalk(key)}
        paths[name] = tiny.write_weights(folder / f"{name}.safetensors", weights), module
    return paths


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, files) -> worker_group.Outcome:
    return worker_group.run(2, [case.job(files) for case in CASES], tmp_path_factory.mktemp("gloo"))


def held(outcome: worker_group.Outcome, name: str, way: str) -> list[int]:
    """Bytes of weights on each rank's device."""
    return outcome.held[CASES.index(Case(name, way))]


def alone(case: Case, files: dict[str, tuple[str, str]]) -> torch.Tensor:
    path, module = files[case.name]
    model = model_class(case.config).from_checkpoint(path, module=module)
    with torch.inference_mode():
        return model(*case.given, case.conditioning)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_give_the_same_from_wherever_they_lie(outcome, files, name):
    chosen = [case for case in CASES if case.name == name]
    expected = alone(chosen[0], files)
    for case in chosen:
        assert tiny.relative_error(outcome.latents[CASES.index(case)], expected) <= 2e-6, str(case)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_rank_holds_its_share_of_them(outcome, name):
    case = Case(name, "whole")
    sides, others = (sum(case.sizes(of_sides).values()) for of_sides in (True, False))
    blocks = sum(nbytes for key, nbytes in case.sizes(False).items() if key.startswith("blocks."))
    fixed = others - blocks
    assert held(outcome, name, "whole") == [sides + others] * 2
    for nbytes in held(outcome, name, "shared"):
        assert nbytes - fixed - blocks / 2 == pytest.approx(sides / 2, rel=0.02)  # weights start at round addresses
    assert held(outcome, name, "in host memory") == [fixed] * 2
    tensor, shapes = Case(name, "tensor"), case.config.shapes()
    assert held(outcome, name, "tensor") == [4 * held_parameters(tensor.config, tensor.plan)] * 2
    part = sum(4 * math.prod(TensorShard(2).held_shape(key, shapes[key])) for key in case.sizes(True))
    assert part == pytest.approx(sides / 2, rel=0.01)  # norms and some biases are whole


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_counts_them_where_they_lie(outcome, name):
    config = CONFIGS[name]
    sizes = {key: 4 * math.prod(shape) for key, shape in config.shapes().items() if runs(key, config)}
    demand = demand_of(sizes, config, 0)
    assert demand.blocks == config.num_layers
    whole, shared = held(outcome, name, "whole")[0], held(outcome, name, "shared")[0]
    assert demand.whole == pytest.approx(whole, rel=1e-3)
    assert needed_bytes(demand, 2, demand.blocks) - SLOTS * demand.block == pytest.approx(shared, rel=1e-3)
    with pytest.raises(PlacementError, match="are missing"):
        choose_placement(demand, [whole - 1] * 2, 2, shard="off", offload="off")


def test_what_stays_on_a_device_is_what_is_counted():
    config, device = CONFIGS["s2v"], torch.device("cpu")
    weights, model = {k: w for k, w in tiny.random_weights(config).items() if runs(k, config)}, {}
    order, number_of = config.run_order(range(config.num_layers)), config.block_number
    store = BlockStore(
        weights,
        lambda name: (weights[name], None),
        model.__setitem__,
        device,
        number_of=number_of,
        order=order,
    )
    demand = demand_of({name: weight.nbytes for name, weight in weights.items()}, config, 0)
    assert len(set(demand.sizes)) == 2  # some have an injector
    store.load(3)
    offloader = BlockOffloader(store)
    assert (len(store.on_device), store.device_bytes) == (3, demand.parts(1, 3))
    for count in (5, 4, 1, 2, 0):
        offloader.offload(offloader.bytes_beyond(count))
        offloader.onload(count)
        assert (len(store.on_device), store.device_bytes) == (count, demand.parts(1, count))
        assert offloader.bytes_of_staying(count) == demand.parts(1, count)


def test_adapters_take_loras_and_step_out_as_the_blocks_do(pool_of, files):
    pool, given = pool_of(2), tiny.inputs(tiny.ANIMATE)
    conditioning = tiny.conditioning(tiny.ANIMATE, given.x)
    names = ("face_adapter.fuser_blocks.1.linear2", "face_adapter.fuser_blocks.0.linear1_q", "blocks.5.self_attn.o")
    dim = tiny.ANIMATE.dim
    changes = {f"{name}.weight": [LowRank(torch.randn(dim, 4), torch.randn(4, dim), 0.05)] for name in names}
    lora, results = LoraSet("adapters", lambda: changes), []
    for _, shard, offload in list(WAYS.values())[:3]:
        spec = ModelSpec(files["animate"][0], "bf16", "fp32", shard_weights=shard, offload=offload)
        results.append([pool.forward(spec, *given, lora, conditioning=conditioning)])
        pool.offload(spec, [0, 1], 1e30)
        results[-1].append(pool.forward(spec, *given, conditioning=conditioning))
    for merged, plain in results:
        assert torch.equal(merged, results[0][0]) and torch.equal(plain, results[0][1])
    assert not torch.equal(*results[0])
    pool.unload()


# Divided by tensor parallelism, on heads and blocks that fit in few bytes.

SMALL_INFINITETALK = tiny.INFINITETALK.having(InfiniteTalk(48, heads=8), dim=256, num_heads=4)
SMALL = {
    "one speaker": SMALL_INFINITETALK,
    "two speakers": SMALL_INFINITETALK,
    "animate": replace(tiny.ANIMATE, dim=512, num_heads=4, num_layers=5),
    **{name: replace(CONFIGS[name], num_heads=4, num_layers=2) for name in ("humo", "s2v", "dancer")},
}
SIZES = (2, 4)


@dataclass(frozen=True)
class Whole:
    """A model of one process, held as the test wants it."""

    name: str
    quantized: bool

    @property
    def config(self) -> WanConfig:
        return SMALL[self.name]

    def weights(self) -> dict[str, Weight]:
        held = tiny.random_weights(self.config)
        if not self.quantized:
            return held
        sides = {key for key, weight in held.items() if weight.ndim == 2 and any(part in key for part in PARTS)}
        return held | {key: Fp8Weight.quantize(held[key], torch.float8_e4m3fn) for key in sides}

    def forward(self, shard: TensorShard) -> torch.Tensor:
        """What a rank that has this part of the model gives."""
        config = self.config
        model = model_class(config)(config, get_kernel("sdpa", torch.device("cpu"), torch.float32))
        for key, weight in self.weights().items():  # also those for blocks that it lacks
            model.set_weight(key, shard.take(key, weight))
        shard.apply(model)
        given = tiny.inputs(config, (3, 6, 8))
        conditioning = tiny.conditioning(config, given.x)
        if self.name == "one speaker":
            conditioning = replace(conditioning, speakers=None)
        return model.eval()(*given, conditioning)


PARTS = tuple(part for parts in SIDES.values() for part in parts)
MODELS = [*(Whole(name, False) for name in SMALL), *(Whole(name, True) for name in ("two speakers", "animate"))]


def divide(rank: int, world: int) -> gloo_group.Results:
    outputs = {}
    for size in SIZES:
        groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
        shard = TensorShard(size, rank % size, groups[rank // size])
        for number, model in enumerate(MODELS):
            outputs[f"{size} {number}"] = model.forward(shard)
    return outputs


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> list[gloo_group.Results]:
    return gloo_group.run(4, divide, tmp_path_factory.mktemp("tensor"))


@pytest.mark.parametrize("number", range(len(MODELS)), ids=map(str, MODELS))
def test_ranks_with_some_heads_each_give_what_one_process_gives(divided, number):
    with torch.inference_mode():
        expected = MODELS[number].forward(TensorShard())
    for size in SIZES:
        for results in divided:
            assert tiny.relative_error(results[f"{size} {number}"], expected) <= 2e-6


def test_heads_of_speech_that_do_not_divide_are_refused():
    config = replace(tiny.INFINITETALK, num_heads=15)
    spec, settings = ModelSpec("a", "fp32", "fp32"), PoolSettings(ParallelPlan(3, tensor_parallel=3), device="cpu")
    with pytest.raises(PlanError, match=r"does not divide the 40 heads of InfiniteTalk's layers\. Use one of 1, 5\."):
        check_plan(config, spec, settings)
