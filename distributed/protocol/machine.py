"""The measured rates of a worker's device and of its links, from which the planner computes what a step takes."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_RATE = 0.89
"""Of the rate of matrix products: FlashAttention-3 685, products 770 TFLOP/s."""


@dataclass(frozen=True)
class Machine:
    """What one worker's device does, and its ways to the others. The defaults are an H200's with NVLink.

    Args:
        products: FLOP/s of matrix products.
        memory: bytes/s through the device's memory, read or written.
        link: bytes/s that each worker sends while all send to all.
        latency: seconds of an exchange apart from its bytes: its start, and the wait for the slowest rank.
        host: bytes/s from host memory to each device while all of them copy.
    """

    products: float = 770e12
    memory: float = 4e12
    link: float = 250e9
    latency: float = 4e-4
    host: float = 40e9

    @property
    def attention(self) -> float:
        """FLOP/s of self-attention."""
        return self.products * ATTENTION_RATE
