"""Time a list of strategies one after the other, beside what the cost model expects of each.

    python3 benchmarks/strategies.py --size 14b --res 480p --gpus 4 --batch 2 --plans auto u4 d2u2 t4 p2t2 shard offload

A strategy is sizes by their letters, as in d2u2: d data, p pipeline, t tensor, u Ulysses, r ring; what they leave over
shares the token sequence. `shard` and `offload` are the default sizes with shard_weights or offload on; `auto` is what
the config node's parallel_plan auto chooses. Each may have more after a comma: p2t2,offload. Prints one JSON line a
case (see rows.py), and a table at the end; a strategy that cannot run is named there with the reason.

    NCCL_P2P_DISABLE=1 python3 benchmarks/strategies.py ...     # traffic through host memory
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import dit_step  # loads the pack
import torch
from benchlib.flops import latent_size, tokens_of
from benchlib.rows import Row, publish
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import CHOICES
from wan_parallel.distributed.planner.planner import room_of, slowest
from wan_parallel.distributed.planner.search import PlanRequest, choose
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.attention.kernels import KERNEL_NAMES
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.user_error import UserError
from wan_parallel.wanvideo.checkpoint.weight_source import WEIGHT_DTYPES, model_config

log = logging.getLogger("strategies")

SIZES = {
    "d": "data_parallel",
    "p": "pipeline_parallel",
    "t": "tensor_parallel",
    "u": "ulysses_degree",
    "r": "ring_degree",
}
SWITCHES = {"shard": "shard_weights", "offload": "offload"}


@dataclass(frozen=True)
class Strategy:
    """One way to run: sizes, and what is on."""

    name: str
    plan: ParallelPlan
    auto: bool
    switches: tuple[str, ...]

    @classmethod
    def of(cls, name: str, num_gpus: int) -> Strategy:
        """The strategy of that short name.

        Raises:
            ValueError: the name means nothing.
        """
        auto, switches, sizes = False, [], {}
        for word in name.split(","):
            if word in SWITCHES:
                switches.append(SWITCHES[word])
            elif word == "auto":
                auto = True
            elif re.fullmatch(r"([dptur]\d)+", word):
                sizes |= {SIZES[letter]: int(size) for letter, size in re.findall(r"([dptur])(\d)", word)}
            else:
                raise ValueError(f"There is no strategy {word}. Use auto, shard, offload, or sizes such as d2u2.")
        return cls(name, ParallelPlan(num_gpus, **sizes), auto, tuple(switches))


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    rows, refused = [], []
    for strategy in options.plans:
        try:
            for row in _time(strategy, options):
                publish(row, options.out)
                rows.append(row)
        except UserError as error:
            log.warning("%s: %s", strategy.name, error)
            refused.append(f"{strategy.name}: {error}")
    print("\n".join([*_table(rows), *refused]), file=sys.stderr)
    return 0 if rows else 1


def _time(strategy: Strategy, options: argparse.Namespace) -> list[Row]:
    settings = PoolSettings(
        strategy.plan, device=options.device, memory_fraction=options.memory_fraction, auto=strategy.auto
    )
    spec = ModelSpec(
        options.model or f"random:{options.size}",
        weight_dtype=options.weights or options.precision,
        compute_dtype=options.precision,
        attention=options.attention,
        slice_tokens=options.slice_tokens,
        max_batch=options.max_batch,
        shard_weights=options.shard_weights,
        offload=options.offload,
    )
    spec = replace(spec, **dict.fromkeys(strategy.switches, "on"))
    pool = Pool(settings)
    try:
        return [_row(pool, strategy, spec, res, options) for res in options.res.split(",")]
    finally:
        pool.close()


def _row(pool: Pool, strategy: Strategy, spec: ModelSpec, res: str, options: argparse.Namespace) -> Row:
    row = dit_step.our_row(pool, spec, res, options, strategy=strategy.name)
    profiles = pool.probe()
    request = PlanRequest(
        pool.settings.plan,
        replace(pool.settings, auto=False),
        model_config(spec.path),
        spec,
        tokens_of(latent_size(res, options.size)),
        options.batch,
    )
    machine = slowest(profiles)
    expected = choose(request, machine, room_of(profiles))[0].expected
    log.info("%s at %s: %s, %s", strategy.name, res, machine, expected)
    return replace(
        row,
        expected_s=round(expected.seconds, 4),
        link_gbps=round(machine.link / 1e9, 1),
    )


def _table(rows: list[Row]) -> list[str]:
    """The rows in words, the fastest of each resolution first."""
    lines = [f"{'res':12}{'strategy':16}{'s':>9}{'expected':>10}{'GiB':>8}  sizes"]
    for row in sorted(rows, key=lambda row: (row.res, row.s)):
        sizes = f"data {row.data or 1} pipeline {row.pipeline} tensor {row.tensor} Ulysses {row.ulysses} x {row.ring}"
        memory = f"{row.allocated_gib:8.2f}"
        lines.append(f"{row.res:12}{row.strategy:16}{row.s:9.4f}{row.expected_s:10.4f}{memory}  {sizes}")
    return lines


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--res", default="480p", help="comma-separated: 480p, 720p or FRAMESxROWSxCOLUMNS")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--batch", type=int, default=2, help="items of a forward; 2 are the branches of cfg")
    parser.add_argument("--max-batch", type=int, default=1, help="items that go through the model at once")
    parser.add_argument("--plans", nargs="+", default=["auto"], help="strategies, see above")
    parser.add_argument("--iters", type=int, default=5, help="timed forwards, after one that is not")
    parser.add_argument("--precision", choices=sorted(dit_step.DTYPES), default="bf16")
    parser.add_argument("--weights", choices=sorted(WEIGHT_DTYPES), help="where they are held in another precision")
    parser.add_argument("--attention", choices=KERNEL_NAMES, default="auto")
    parser.add_argument("--slice-tokens", type=int, default=8192, help="as max_sequence_length; 0 takes all at once")
    parser.add_argument("--shard-weights", choices=CHOICES, default="auto")
    parser.add_argument("--offload", choices=CHOICES, default="auto")
    parser.add_argument("--memory-fraction", type=float, default=1.0, help="cap on each GPU's memory")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--model", help="a checkpoint of that --size; random weights without")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    options = parser.parse_args()
    try:
        options.plans = [Strategy.of(name, options.gpus) for name in options.plans]
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
