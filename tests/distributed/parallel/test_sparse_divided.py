"""Sparse attention of a model that ranks share gives what one process gives, however they share it.

Runs comfy-kitchen's plain reference of its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from testkit import tiny, worker_group
from wan_parallel.distributed.parallel.model_division import without_ring
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.worker.forward_attention import exact_tokens
from wan_parallel.wanvideo.attention import kitchen, sparse
from wan_parallel.wanvideo.attention.sparse import SparseAttention
from wan_parallel.wanvideo.base.attention_choice import AttentionChoice, SparseSettings
from wan_parallel.wanvideo.base.conditioning import NOTHING, extended
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import pad_to_patch, patchify, sequence_of, unpatchify
from wan_parallel.wanvideo.model.model import WanModel

pytestmark = pytest.mark.skipif(
    kitchen.refusal("") is not None, reason="comfy-kitchen has the reference of the kernel, and is not installed"
)

SIX_HEADS = WanConfig(dim=768, ffn_dim=256, num_heads=6, num_layers=2, text_dim=64)
SIZE = (3, 20, 22)  # 330 tokens, 6 blocks
KEEP = SparseSettings(keep=0.2, extra_tokens=0, dense_blocks=(1,), min_tokens=0, sigma_start=0.9, sigma_end=0.1)
TAU = replace(KEEP, tau=1.0, keep=0.0, dense_blocks=())
IN_THE_MIDDLE = AttentionChoice(KEEP, 0.5)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One forward of a plan."""

    plan: ParallelPlan
    choice: AttentionChoice = IN_THE_MIDDLE
    overlap: bool = True
    batch: int = 1
    spec: tuple[tuple[str, object], ...] = ()

    def job(self, path: str) -> worker_group.Job:
        spec = replace(ModelSpec(path, "fp32", "fp32"), **dict(self.spec))
        given = tiny.inputs(SIX_HEADS, SIZE, self.batch)
        return worker_group.Job(self.plan, spec, given, overlap=self.overlap, attention=self.choice)


ULYSSES = ParallelPlan(4, ulysses_degree=4)  # 2, 2, 1 and 1 heads, the slices of which are beside the exchange
CASES = {
    "ulysses": Case(ULYSSES),
    "ulysses, threshold": Case(ULYSSES, AttentionChoice(TAU, 0.5)),
    "ulysses, one exchange after the other": Case(ULYSSES, overlap=False),
    "unlike speeds": Case(replace(ULYSSES, speeds=(4, 1, 1, 2))),
    "tensor x ulysses": Case(without_ring(ParallelPlan(4, tensor_parallel=2), 6, "It")),
    "pipeline x ulysses": Case(ParallelPlan(4, pipeline_parallel=2), batch=2),
    "data x ulysses": Case(ParallelPlan(4, data_parallel=2, ring_degree=1), batch=3),
    "an item fewer than data-parallel groups": Case(ParallelPlan(4, data_parallel=2, ring_degree=1)),
    "sharded weights": Case(ULYSSES, spec=(("shard_weights", "on"),)),
    "weights in host memory": Case(ULYSSES, spec=(("offload", "on"),)),
    "before the steps that are sparse": Case(ULYSSES, AttentionChoice(KEEP, 0.95)),
    "fewer tokens than asked for": Case(ULYSSES, AttentionChoice(replace(KEEP, min_tokens=331), 0.5)),
    "a ring, in a dense step": Case(ParallelPlan(4, ring_degree=2), AttentionChoice(KEEP, 0.05)),
}
DENSE = [name for name in CASES if any(word in name for word in ("before", "fewer tokens", "dense step"))]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("six") / "six.safetensors", SIX_HEADS)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, path) -> dict[str, tuple[torch.Tensor, list]]:
    jobs = [case.job(path) for case in CASES.values()]
    done = worker_group.run(4, jobs, tmp_path_factory.mktemp("gloo"))
    return dict(zip(CASES, zip(done.latents, done.replies, strict=True), strict=True))


def alone(path: str, case: Case, conditioning=NOTHING) -> torch.Tensor:
    """The forward in one process."""
    model, (x, timestep, context) = WanModel.from_checkpoint(path), case.job(path).given
    x, conditioning = extended(x, conditioning)
    grid, settings = sequence_of(x, conditioning.options), case.choice.sparse
    attention = SparseAttention(
        sparse.load(CPU, torch.float32, 128), model.kernel, settings, exact_tokens(grid, conditioning.options)
    )

    def enter(block: int) -> None:
        attention.block = block

    part = slice(0, grid.tokens)
    tokens = patchify(pad_to_patch(x))
    out = model.transform(tokens, grid, part, timestep, context, attention.kernel, enter, conditioning)
    return unpatchify(out[:, : grid.video_tokens], grid, x.shape[-3:])


@pytest.mark.parametrize("name", [name for name in CASES if name not in DENSE])
def test_ranks_that_share_a_model_give_what_one_process_gives(outcome, path, name):
    latent, replies = outcome[name]
    case = CASES[name]
    expected, dense = alone(path, case), WanModel.from_checkpoint(path)(*case.job(path).given)
    assert tiny.relative_error(latent, expected) <= 2e-6
    assert tiny.relative_error(expected, dense) > 1e-4  # else the test would show nothing
    for reply in replies:
        use = reply.outcome.attention
        assert (use.sparse_blocks, use.blocks) == (2 - len(case.choice.sparse.dense_blocks), 2)
        assert use.why_dense == "" and use.dense == "sdpa"


@pytest.mark.parametrize("name", DENSE)
def test_a_forward_outside_of_the_settings_is_dense_and_says_why(outcome, path, name):
    latent, replies = outcome[name]
    assert tiny.relative_error(latent, WanModel.from_checkpoint(path)(*CASES[name].job(path).given)) <= 2e-6
    use = replies[0].outcome.attention
    assert use.sparse_blocks == 0
    assert use.why_dense.startswith("330 tokens are fewer" if "tokens" in name else "sigma 0.")


# Plans.


@pytest.mark.parametrize("heads", [12, 24, 40])
@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("data", [1, 2])
def test_a_plan_whose_degrees_are_open_has_no_ring_for_sparse_attention(heads, gpus, data):
    if gpus % data:
        return
    plan = ParallelPlan(gpus, data_parallel=data)
    found = without_ring(plan, heads, "It")
    found.validate()
    for ranks in (found.sequence_ranks, found.sequence_ranks * data):
        assert found.sequence_degrees(heads, ranks).ring == 1
    rings = [plan.sequence_degrees(heads, ranks).ring for ranks in (plan.sequence_ranks, gpus)]
    assert (found == plan) == (max(rings) == 1)


@pytest.mark.parametrize(
    "plan", [ParallelPlan(4, ring_degree=2), ParallelPlan(4, ulysses_degree=2), ParallelPlan(8, ring_degree=8)], ids=str
)
def test_a_ring_that_is_set_is_refused_in_words(plan):
    with pytest.raises(PlanError, match=r"all keys of a head on one GPU.*ring \d.*\. Set ulysses_degree") as refusal:
        without_ring(plan, 12, "Sparse attention")
    assert tiny.sentences(str(refusal.value)) == 2


def test_more_gpus_than_heads_are_refused_in_words():
    with pytest.raises(PlanError, match=r"3 heads are too few for 4 GPUs\. Use fewer"):
        without_ring(ParallelPlan(4), 3, "Sparse attention")
