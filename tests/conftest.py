"""What all tests share: the pack under the name `wan_parallel`, a tiny checkpoint, pools that stay up."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
import torch
from testkit import tiny
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.model.model import WanModel

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other keep the workers waiting


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--repeat-faults", type=int, default=1, help="how often to run each test that kills or interrupts a process"
    )
    parser.addoption(
        "--full-support-matrix",
        action="store_true",
        help="run every variant in every format under every strategy, not each pair of them alone",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "repetition" in metafunc.fixturenames:
        metafunc.parametrize("repetition", range(metafunc.config.getoption("repeat_faults")))


@pytest.fixture
def ctrl_c_works() -> Iterator[None]:
    """Programs of the test end at SIGINT, also where the tests were started without it (by nohup, by a shell's &)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of `tiny.TINY` in fp32."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture(scope="session")
def spec(checkpoint: str) -> ModelSpec:
    """The tiny model in fp32 throughout."""
    return ModelSpec(checkpoint, "fp32", "fp32")


@pytest.fixture(scope="session")
def model(checkpoint: str) -> WanModel:
    """The tiny model in this process, in fp32."""
    return WanModel.from_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def pool_of() -> Iterator[Callable[..., Pool]]:
    """Gives the CPU pool of a plan; pools stay up for the whole run, since a start takes seconds."""
    pools: dict[ParallelPlan, Pool] = {}

    def get(num_gpus: int, **degrees: int) -> Pool:
        plan = ParallelPlan(num_gpus, **degrees)
        pools[plan] = acquire(PoolSettings(plan, device="cpu"))
        return pools[plan]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module")
def own_pool() -> Iterator[Pool]:
    """Two workers for the tests of one file that harm them; a forward starts new ones."""
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    yield pool
    pool.close()
