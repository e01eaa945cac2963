"""Graphs that ComfyUI refuses, and what the user reads."""

from __future__ import annotations

import pytest
from testkit.comfyui.comfy_server import ComfyServer, QueueRefused
from testkit.comfyui.graphs import conditions, ksampler, link, node, pool_model, video

PLAIN = {**pool_model(), **conditions(), **video(), **ksampler()}
OUTPUT = {"out": node("SaveLatentTensor", samples=link("sampler"), name="refused")}


def refused_text(server: ComfyServer, graph: dict) -> str:
    """Queue `graph`, which must be refused with status 400, and return what the user reads."""
    with pytest.raises(QueueRefused) as refusal:
        server.queue({**PLAIN, **OUTPUT, **graph})
    assert refusal.value.status == 400
    return " ".join(refusal.value.texts)


def error_text(server: ComfyServer, graph: dict) -> str:
    """Run `graph`, which must fail, and return what the user reads."""
    outcome = server.run({**PLAIN, **OUTPUT, **graph})
    assert outcome.state == "error"
    return outcome.message.strip()
