"""What of ComfyUI's environment reaches the workers."""

from __future__ import annotations

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
from wan_parallel.distributed.executors.local import worker_environment


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ("backend:cudaMallocAsync", None),
        ("max_split_size_mb:512,backend:cudaMallocAsync", "max_split_size_mb:512"),
        ("expandable_segments:True", "expandable_segments:True"),
    ],
)
def test_comfyuis_choice_of_an_allocator_stays_its_own(name, given, passed_on):
    environment = worker_environment({"HOME": "/home/somebody", name: given})
    assert environment.get(name) == passed_on
    assert environment["HOME"] == "/home/somebody"
