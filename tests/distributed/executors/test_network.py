"""The workers of one machine reach each other through the loopback alone, whatever the environment says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import testkit
from testkit import tiny
from testkit.processes import LOOPBACK, descendants, listening
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.executors import network
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import PoolSettings

SUPPORT = Path(testkit.__file__).parents[1]
PROGRAM = ("-m", "testkit.listening_pools")
TUNING = {"NCCL_P2P_DISABLE": "1", "NCCL_ALGO": "Ring", "NCCL_DEBUG": "WARN", "GLOO_LOG_LEVEL": "INFO"}
OTHERS_PLACES = {
    "GLOO_SOCKET_IFNAME": "outer0",
    "GLOO_DEVICE_TRANSPORT": "IBVERBS",
    "TP_SOCKET_IFNAME": "outer0",
    "NCCL_SOCKET_IFNAME": "outer0",
    "NCCL_SOCKET_FAMILY": "AF_INET6",
    "NCCL_COMM_ID": "10.99.0.1:29500",
    "NCCL_OOB_NET_ENABLE": "1",
    "NCCL_RAS_ADDR": "10.99.0.1:28028",
    "TORCH_SYMMMEM": "NVSHMEM",
    "MASTER_ADDR": "10.99.0.1",
    "MASTER_PORT": "29500",
}
OUTER = """
ip link set lo up
ip link add outer0 type veth peer name outer1
ip address add 10.99.0.1/24 dev outer0
ip link set outer0 up
ip link set outer1 up
"""
FIND = """
import sys
sys.path.insert(0, {root!r})
import bootstrap
bootstrap.load_pack()
from wan_parallel.distributed.executors import network
try:
    print(network.loopback())
except network.NetworkError as error:
    print(error)
assert "torch" not in sys.modules
"""


def in_own_namespace(setup: str, *command: str, environment: dict[str, str] | None = None) -> str:
    """What a command of this Python prints in a network namespace of its own, which `setup` prepares."""
    if subprocess.run(["unshare", "-rn", "ip", "link"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a network namespace, or has no iproute2")
    return subprocess.run(
        ["unshare", "-rn", "sh", "-c", f'set -e\n{setup}\nexec "$@"', "sh", sys.executable, *command],
        env=os.environ | (environment or {}) | {"PYTHONPATH": str(SUPPORT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def test_every_kind_of_parallelism_listens_on_the_loopback_alone(checkpoint):
    kinds = ["ulysses, ring, patches", "tensor, pipeline, pipefusion"]
    said = in_own_namespace(OUTER, *PROGRAM, checkpoint, *kinds, environment=OTHERS_PLACES).splitlines()
    assert [json.loads(line)["kind"] for line in said] == kinds
    for found in map(json.loads, said):
        assert found["right"], found
        assert found["listening"] and set(found["listening"]) <= LOOPBACK, found


def test_interfaces_of_others_and_such_that_do_not_exist_are_left_alone(monkeypatch, spec, model):
    for name, value in (OTHERS_PLACES | {"GLOO_SOCKET_IFNAME": "nowhere9"}).items():
        monkeypatch.setenv(name, value)
    pool, given = Pool(PoolSettings(ParallelPlan(2, data_parallel=2), device="cpu")), tiny.inputs(batch=2)
    try:
        assert tiny.relative_error(pool.forward(spec, *given), model(*given)) <= 2e-6
        found = listening({pool.launcher_pid, *descendants(pool.launcher_pid)})
        assert found and set(found) <= LOOPBACK
    finally:
        pool.close()


def test_where_the_loopback_is_down_one_worker_runs_and_several_say_what_to_do(checkpoint):
    said = in_own_namespace("", *PROGRAM, checkpoint, "alone", "tensor, pipeline, pipefusion").splitlines()
    alone, several = map(json.loads, said)
    assert alone["right"] and not alone["listening"]
    assert "(lo) is down" in several["error"] and "ip link set lo up" in several["error"]
    assert "num_gpus to 1" in several["error"] and tiny.sentences(several["error"]) == 2


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ("ip link set lo up", "lo"),
        ("ip link set lo name back0; ip link set back0 up", "back0"),
        ("ip link set lo name back0", "interface (back0) is down"),
        ("ip link set lo up; ip address flush dev lo", "interface (lo) has no IPv4 address"),
    ],
)
def test_the_loopback_is_found_by_what_it_is_or_said_not_to_work(setup, said):
    found = in_own_namespace(setup, "-c", FIND.format(root=str(testkit.ROOT))).strip()
    assert found == said or (" " in said and said in found and tiny.sentences(found) == 2)


def test_only_where_to_listen_is_decided_and_nothing_else():
    environment = TUNING | OTHERS_PLACES | {"HOME": "/home/somebody"}
    network.bind(environment, "lo")
    assert {name: environment[name] for name in TUNING} == TUNING and environment["HOME"] == "/home/somebody"
    assert not [value for value in environment.values() if "outer" in value or "10.99" in value]
    assert environment["NCCL_RAS_ENABLE"] == "0"
    asked_for = {"NCCL_RAS_ENABLE": "1"}
    network.bind(asked_for, "lo")
    assert asked_for["NCCL_RAS_ENABLE"] == "1"


MEET = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[2])
from testkit.processes import listening
identity = ctypes.create_string_buffer(128)
assert ctypes.CDLL(sys.argv[1]).ncclGetUniqueId(identity) == 0
print(*listening([os.getpid()]))
"""


def test_nccl_meets_on_the_loopback_alone():
    found = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    if found is None:
        pytest.skip("this torch comes without NCCL")
    library = next(Path(found.submodule_search_locations[0]).glob("lib/libnccl.so*"))
    environment = os.environ | OTHERS_PLACES
    network.bind(environment, network.loopback())
    ran = subprocess.run(
        [sys.executable, "-c", MEET, str(library), str(SUPPORT)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() and set(ran.stdout.split()) <= LOOPBACK
