"""The names under which programs and rows call the attention of a forward: dense, keep=0.1 or tau=1.3,extra=256."""

from __future__ import annotations

from wan_parallel.wanvideo.base.attention_choice import PLAIN_ATTENTION, AttentionChoice, SparseSettings

DENSE = "dense"


def settings_of(name: str) -> SparseSettings:
    """The settings of a name with keep= (a share of the key blocks) or tau=, and extra= (tokens) behind it.

    Raises:
        ValueError: it is no such name.
    """
    given = dict(part.split("=") for part in name.split(",") if part.count("=") == 1)
    if len(given) != len(name.split(",")) or not given.keys() <= {"keep", "tau", "extra"} or name[:5] == "extra":
        raise ValueError(f"--sparse is {name}. Use {DENSE}, keep=SHARE or tau=THRESHOLD, and extra=TOKENS behind it.")
    return SparseSettings(
        tau=float(given.get("tau", 1.3)),
        keep=float(given.get("keep", 0)),
        extra_tokens=int(given.get("extra", 0)),
        min_tokens=0,
    )


def attention_of(name: str) -> AttentionChoice:
    """The attention of a name, in all steps."""
    return PLAIN_ATTENTION if name == DENSE else AttentionChoice(settings_of(name))
