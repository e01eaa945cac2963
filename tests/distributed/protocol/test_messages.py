"""Messages arrive as they were sent, and nothing else is taken for one."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator
from importlib import import_module, util
from types import ModuleType

import pytest
import testkit
from testkit import tiny
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol import messages, refs, replies, reports, requests, silence, specs
from wan_parallel.distributed.protocol.codec import ProtocolError
from wan_parallel.distributed.protocol.machine import Machine
from wan_parallel.distributed.protocol.pool_errors import Failure
from wan_parallel.wanvideo.base.options import Options, RopeOptions

SPEC = specs.ModelSpec(
    "/models/wän 14B.safetensors", "bf16", "fp16", "sdpa", False, True, 4096, 2, "171-28", "on", "off"
)
ARENA = refs.ArenaRef("/proc/12/fd/7", 2**35, 3)
TENSOR = refs.TensorRef("float32", (2, 16, 21, 60, 104), 64)
READY = messages.Ready(1, 4321, "NVIDIA H200", "2.13.0+cu130", "")
STATUS = reports.WorkerStatus(
    rank=1,
    pid=4321,
    device="CPU",
    used=2**33,
    total=2**37,
    peak_private=2**20,
    fused=True,
    models=(reports.ModelStatus("wan.safetensors", "bf16", "fp16", "sdpa", "native", 4, 2, "uuid"),),
    link="NVLink",
    memory=reports.MemoryUse(2**35, 2**30, 4, 3, 2, 1, 2**37, True),
)
WEIGHTS = (reports.HeldWeights(SPEC, 5, 2**35),)
EXCHANGE = reports.Exchange("distrifuser 0.0.1b1", 2**31, 0.2, 1 / 3, 2**35)
PROFILE = reports.DeviceProfile(Machine(1e14, 1 / 3), 2**36, 2**37, 5, "NVLink")
WAITS = (reports.WaitTimes.of("ring", (0, 2), [0.25, 1e-6]), reports.WaitTimes.of("weights", (), []))
FAILURE = Failure("Two words. Do this.", ("TooLarge", "PlanError"), True)
REPLY = replies.Reply(7, 1, replies.ForwardDone(WAITS, EXCHANGE), 0.1 + 0.2, WEIGHTS, ("vae-bf16-decoder",))
OUTCOMES = (replies.Done(), replies.ForwardDone(()), STATUS, PROFILE, replies.GivenUp(), FAILURE)
SPLIT = PatchSplit("temporal", 32, 16)
DISPLACED = requests.Displaced("stale", "run", ("cond:0", "uncond:0"), SPLIT, True, "native", "new")
SETTINGS = specs.PoolSettings(ParallelPlan(8, 2, ulysses_degree=4), "cuda", 0.9, "xfuser", False)
LOCATIONS = (specs.RankLocation("", 0), specs.RankLocation("another", 3))
SAMPLES = [
    messages.Start(SETTINGS, LOCATIONS, 99, "/proc/99/fd/7", silence.SilenceLimits(30.0)),
    messages.Join(1, SETTINGS, LOCATIONS, "tcp://10.0.0.1:29500", "/proc/12/fd/8", "/proc/12/fd/9"),
    requests.Load(1, SPEC),
    requests.ApplyLora(
        2,
        SPEC,
        "uuid",
        ARENA,
        {
            "blocks.0.ffn.0.weight": (
                refs.LoraRef("LowRank", (TENSOR, TENSOR), 1 / 3, 0.5),
                refs.LoraRef("Replacement", (TENSOR,)),
            ),
            "head.head.bias": (),
        },
    ),
    requests.Forward(3, SPEC, ARENA, TENSOR, TENSOR, TENSOR, TENSOR),
    requests.Forward(
        3,
        SPEC,
        ARENA,
        *(TENSOR,) * 4,
        conditioning=refs.ConditioningRef(
            ARENA, {"vace": TENSOR}, Options(1, (0.7, 1 / 3), (9,), RopeOptions(scale_t=0.5))
        ),
    ),
    requests.Forward(3, SPEC, ARENA, TENSOR, TENSOR, TENSOR, TENSOR, DISPLACED),
    requests.LoadVAE(4, "vae-bf16", "vae-bf16-decoder", "bf16", ARENA, {"conv2.weight": TENSOR}),
    requests.DecodeVAE(4, "key", ARENA, TENSOR, ARENA, TENSOR, TENSOR, requests.VAEOptions(axis="rows", speeds=(2, 1))),
    requests.EncodeVAE(4, "key", ARENA, TENSOR, ARENA, TENSOR, TENSOR),
    requests.Trim(4),
    requests.Unload(4, (SPEC, SPEC)),
    requests.Unload(4, ()),
    requests.Offload(4, SPEC, (0, 3), 1e30),
    requests.Report(5),
    requests.Probe(5),
    requests.Reconfigure(5, ParallelPlan(4, 2, tensor_parallel=2, speeds=(3, 1, 1, 2))),
    messages.Cancel(6),
    READY,
    REPLY,
    *(replies.Reply(8, 0, outcome) for outcome in OUTCOMES),
    messages.StartFailed(1, FAILURE),
    messages.PoolReady((READY, READY)),
    replies.Replies(9, (REPLY, replies.Reply(9, 0, FAILURE))),
    silence.Silence((silence.SilentProcess("Worker rank 1", 12, "in a forward", silence.STOPPED, 12.5, 1 / 3),)),
    messages.PoolFailed(Failure("Worker rank 1 was ended by SIGKILL.", ("WorkerDied", "PoolError"), True)),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message):
    assert messages.decode(messages.encode(message)) == message


def test_every_kind_of_message_is_tried_here():
    assert {type(message) for message in SAMPLES} == set(typing.get_args(messages.Message))


def test_every_outcome_is_tried_here():
    assert {type(outcome) for outcome in OUTCOMES} == set(typing.get_args(replies.Outcome))


def test_each_request_says_whether_ranks_wait_for_each_other_and_what_answers_it():
    for kind in typing.get_args(requests.AnyRequest):
        assert isinstance(vars(kind)["collective"], bool)
        assert kind.outcome in typing.get_args(replies.Outcome)


def test_what_arrives_can_be_a_key_as_the_original_can():
    sent = messages.decode(messages.encode(requests.Load(1, SPEC)))
    assert {SPEC: 1}[sent.spec] == 1


@pytest.mark.parametrize(
    "data",
    [b'{"type": "Shutdown", "id": 1}', b'{"id": 1}', b'{"type": "ModelSpec", "path": "x"}', b'{"type": "system"}'],
)
def test_an_unknown_type_is_refused(data):
    with pytest.raises(ValueError, match="unknown type") as error:
        messages.decode(data)
    assert tiny.sentences(str(error.value)) == 2


def changed(message: messages.Message, *path: str | int, to: object) -> bytes:
    """A message with another value in the field that `path` leads to, as bytes."""
    data = json.loads(messages.encode(message))
    *way, last = path
    inner = data
    for step in way:
        inner = inner[step]
    inner[last] = to
    return json.dumps(data).encode()


LOAD = requests.Load(1, SPEC)
FORWARD = requests.Forward(3, SPEC, ARENA, TENSOR, TENSOR, TENSOR, TENSOR, DISPLACED)
MALFORMED = {
    "a number for a text": changed(LOAD, "spec", "path", to=7),
    "a text for a number": changed(LOAD, "tokens", to="7"),
    "true for a number": changed(LOAD, "tokens", to=True),
    "a fraction for a whole number": changed(LOAD, "id", to=1.0),
    "a number for true": changed(LOAD, "spec", "allow_flash", to=1),
    "null for a text": changed(LOAD, "spec", "path", to=None),
    "null for fields": changed(LOAD, "spec", to=None),
    "a list for fields": changed(LOAD, "spec", to=[]),
    "a text for a list": changed(FORWARD, "x", "shape", to="12"),
    "a text in a list of numbers": changed(FORWARD, "x", "shape", 0, to="2"),
    "fields that are none of an optional one's": changed(FORWARD, "displaced", to={"kind": "stale"}),
    "a list for names": changed(SAMPLES[3], "weights", to=[]),
    "a text where names lead to lists": changed(SAMPLES[3], "weights", "head.head.bias", to="x"),
    "a text for a fraction": changed(requests.Offload(4, SPEC, (0,), 1.0), "nbytes", to="all"),
    "a whole number that no fraction reaches": changed(requests.Offload(4, SPEC, (0,), 1.0), "nbytes", to=10**400),
    "an infinite number": changed(requests.Offload(4, SPEC, (0,), 1.0), "nbytes", to=float("inf")),
    "no number": changed(requests.Offload(4, SPEC, (0,), 1.0), "nbytes", to=float("nan")),
    "an outcome of an unknown type": changed(REPLY, "outcome", "type", to="Undone"),
    "an outcome that is a request": changed(REPLY, "outcome", "type", to="Load"),
    "an outcome with another one's fields": changed(REPLY, "outcome", "type", to="Failure"),
    "an outcome without a type": changed(REPLY, "outcome", to={}),
    "a type that is no text": changed(REPLY, "outcome", "type", to=["Done"]),
    "a field too many": changed(LOAD, "more", to=1),
    "a field too few": b'{"type": "Load", "id": 1}',
    "nothing": b"",
    "half a message": messages.encode(LOAD)[:40],
    "a text alone": b'"Load"',
    "no text": b"\xff\xfe\x00",
    "a list without end": b"[" * 200_000,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_message_is_refused_with_what_to_do(data):
    with pytest.raises(ProtocolError) as error:
        messages.decode(data)
    assert tiny.sentences(str(error.value)) == 2


def test_the_refusal_names_the_field():
    with pytest.raises(ProtocolError, match=r"ModelSpec\.path is not a text"):
        messages.decode(changed(LOAD, "spec", "path", to=7))


def test_a_number_that_is_not_finite_is_not_sent():
    with pytest.raises(ProtocolError, match="cannot be written"):
        messages.encode(requests.Offload(4, SPEC, (0,), float("nan")))


def test_a_whole_number_may_stand_for_a_fraction():
    sent = messages.decode(messages.encode(requests.Offload(4, SPEC, (0,), 2**62)))
    assert sent.nbytes == 2.0**62 and isinstance(sent.nbytes, float)


def test_a_pickle_is_not_opened():
    with pytest.raises(ValueError):
        messages.decode(b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")


@pytest.fixture
def elsewhere() -> Iterator[ModuleType]:
    """The same messages module, as ComfyUI has it: under a name made of a path."""
    name = "/ComfyUI/custom_nodes/My-Wan-Pack"
    root = testkit.ROOT
    spec = util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    yield import_module(f"{name}.distributed.protocol.messages")
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
        del sys.modules[loaded]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_messages_pass_between_packages_of_different_names(elsewhere, message):
    there = elsewhere.decode(messages.encode(message))
    assert type(there) is not type(message) and type(there).__name__ == type(message).__name__
    assert messages.decode(elsewhere.encode(there)) == message
