"""What came of a campaign: a table of counts for people, and a line of JSON for each fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from testkit.campaign.drills import Verdict
from testkit.campaign.faults import KINDS, Fault


@dataclass(frozen=True)
class Counts:
    """Of the faults of one kind, or of all.

    Args:
        faults: how many there were.
        ended, named, nothing_left, bit_equal: of how many of them this held, whatever it took.
        short: how many fell short of a limit or in another way.
        slowest: the most seconds from a fault to the end of what it hit.
    """

    kind: str
    faults: int
    ended: int
    named: int
    nothing_left: int
    bit_equal: int
    short: int
    slowest: float


def counted(kind: str, verdicts: Sequence[Verdict]) -> Counts:
    return Counts(
        kind,
        len(verdicts),
        sum(not verdict.hung for verdict in verdicts),
        sum(not verdict.unnamed for verdict in verdicts),
        sum(not verdict.left for verdict in verdicts),
        sum(not verdict.unequal for verdict in verdicts),
        sum(bool(verdict.short) for verdict in verdicts),
        round(max((verdict.seconds for verdict in verdicts), default=0.0), 1),
    )


def table(verdicts: Sequence[Verdict]) -> list[Counts]:
    """A row for each kind that happened, and one for all."""
    by_kind = {kind: [verdict for verdict in verdicts if verdict.fault.kind == kind] for kind in KINDS}
    return [*(counted(kind, some) for kind, some in by_kind.items() if some), counted("all", verdicts)]


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The table as README shows it."""
    lines = [
        "| fault | times | ended | rank and cause named | nothing left | next result bit-equal | fell short "
        "| slowest, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | {row.faults} | {row.ended} | {row.named} | {row.nothing_left} | {row.bit_equal} "
        f"| {row.short} | {row.slowest:.1f} |"
        for row in table(verdicts)
    ]
    return "\n".join(lines)


def as_line(verdict: Verdict) -> str:
    """One fault as a line of JSON."""
    return json.dumps(asdict(verdict))


def from_line(line: str) -> Verdict:
    """What `as_line` wrote."""
    fields = json.loads(line)
    return Verdict(**{**fields, "fault": Fault(**fields["fault"])})
