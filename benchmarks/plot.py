"""Draw lines of results as pictures: seconds of a forward by GPUs, ours beside the peers, how well they scale, videos.

    pip install matplotlib
    python3 benchmarks/plot.py --size 14b                             # the lines that the README's table rests on
    python3 benchmarks/plot.py benchmarks/results/h200.jsonl:7-26 --out docs

A source is a file of results, or some of its lines. Compare what was measured in one run: pictures say whose lines they
are. Lines of one program on equally many GPUs are drawn as their median. Writes forward.png and efficiency.png of lines
of dit_step.py, and video.png of those of video.py, as far as there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
SHOWN = f"{ROOT / 'benchmarks' / 'results' / 'h200.jsonl'}:7-26"
"""The run that the README's table shows."""

Row = dict[str, Any]
COLOURS = {"WanParallel": "#0072b2", "xDiT": "#d55e00", "diffusers": "#009e73"}
SHADES = ("", "//", "..", "xx")
LIBS = {"wanparallel": "WanParallel", "xdit": "xDiT", "diffusers": "diffusers"}
KERNELS = {"flash_attn_3": "FlashAttention-3", "fa3": "FlashAttention-3", "cudnn": "cuDNN", "sdpa": "SDPA"}


@dataclass(frozen=True)
class Source:
    """Results of a file, and which of its lines they are; "" is all."""

    path: Path
    lines: str
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, text: str) -> Source:
        """The lines of `FILE` or `FILE:FIRST-LAST`, counted from 1.

        Raises:
            ValueError: these are no lines of the file.
        """
        name, _, lines = text.partition(":")
        rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        if lines:
            first, _, last = lines.partition("-")
            if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) <= len(rows)):
                raise ValueError(f"{name} has no lines {lines}. Write such as {name}:1-{len(rows)}, which is all.")
            rows = rows[int(first) - 1 : int(last)]
        return cls(Path(name), lines, tuple(rows))

    def __str__(self) -> str:
        return f"{self.path.name}{f', lines {self.lines}' if self.lines else ''}"


def forwards(rows: Sequence[Row]) -> list[Row]:
    """Lines of dit_step.py at batch 1."""
    return [row for row in rows if {"res", "tflops_per_gpu", "attention"} <= row.keys() and "batch" not in row]


def videos(rows: Sequence[Row]) -> list[Row]:
    """Lines of video.py that are of whole videos."""
    return [row for row in rows if row.get("what") == "video"]


def label(row: Row) -> str:
    """Who ran, and in what way."""
    words = [LIBS.get(row["lib"], row["lib"]), KERNELS.get(row["attention"], row["attention"])]
    words += ["compiled"] if row["compiled"] else []
    words += [f"{kind} {row[kind]}" for kind in ("tensor", "pipeline", "ring") if row.get(kind, 1) > 1]
    words += ["xfuser backend"] if row.get("backend") == "xfuser" else []
    words += ["no overlap"] if row.get("overlapped") is False and row["gpus"] > 1 else []
    words += ["through host memory"] if row.get("link", "").startswith("host memory") else []
    words += [f"fp8 {row['fp8']}"] if row.get("fp8") else []
    words += [f"{row['weights']} weights"] if row.get("weights") else []
    words += ["lossy"] if row["lossy"] else []
    return ", ".join(words)


def by_label(rows: Sequence[Row], value: str = "s") -> dict[str, dict[int, float]]:
    """Medians of a field by label, ours first, and number of GPUs."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in sorted(rows, key=lambda row: (row["lib"] != "wanparallel", row["lossy"], row["s"])):
        found.setdefault(label(row), {}).setdefault(row["gpus"], []).append(row[value])
    return {name: {gpus: median(all_) for gpus, all_ in sorted(own.items())} for name, own in found.items()}


def efficiency(seconds: dict[int, float]) -> dict[int, float]:
    """Of each number of GPUs, the share of their time that one GPU would need for the same; {} without that one."""
    return {gpus: seconds[1] / (gpus * s) for gpus, s in seconds.items()} if 1 in seconds else {}


def cases(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each model and resolution."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["size"], row["res"])):
        found.setdefault((row["size"], row["res"]), []).append(row)
    return found


def draw_forwards(figure: Figure, rows: Sequence[Row]) -> None:
    """Seconds of a forward as bars: a group for each number of GPUs, a panel for each model and resolution."""
    for axis, (case, own) in _panels(figure, rows):
        _bars(axis, by_label(own))
        axis.set_title(" ".join(case))
        axis.set_ylabel("seconds per forward")


def draw_efficiency(figure: Figure, rows: Sequence[Row]) -> None:
    """How much of several GPUs' time is put to use, in lines over their number."""
    for axis, (case, own) in _panels(figure, rows):
        for place, (name, seconds) in enumerate(by_label(own).items()):
            shares = efficiency(seconds)
            if len(shares) > 1:
                style = {"marker": "os^D"[place % 4], "linestyle": ("-", "--", ":", "-.")[place % 4]}
                axis.plot(list(shares), [100 * s for s in shares.values()], color=_colour(name), label=name, **style)
                axis.set_xticks(list(shares))
        axis.set_title(" ".join(case))
        axis.set_xlabel("GPUs")
        axis.set_ylabel("parallel efficiency, %")
        axis.grid(alpha=0.3)
    for axis in figure.axes[1:]:
        axis.sharey(figure.axes[0])


def draw_videos(figure: Figure, rows: Sequence[Row]) -> None:
    """Seconds from noise to frames as lying bars, sampling and decoding apart."""
    for axis, (case, own) in _panels(figure, rows):
        parts = {part: by_label(own, part) for part in ("sampling_s", "decode_s", "s")}
        bars = [(name, gpus) for name, seconds in parts["s"].items() for gpus in seconds]
        names = [f"{name}, {gpus} GPU{'s' if gpus > 1 else ''}" for name, gpus in bars]
        steps, decode, total = ([parts[part][name][gpus] for name, gpus in bars] for part in parts)
        axis.barh(names, steps, color=[_colour(name) for name, _ in bars])
        axis.barh(names, decode, left=steps, color=[_colour(name) for name, _ in bars], alpha=0.45)
        for place, (seconds, decoding) in enumerate(zip(total, decode, strict=True)):
            axis.annotate(f" {seconds:.2f} (decode {decoding:.2f})", (seconds, place), va="center", fontsize=8)
        axis.set_xlim(0, 1.6 * max(total))  # room for the words
        axis.invert_yaxis()
        axis.set_title(f"{' '.join(case)}, {own[0]['steps']} steps")
        axis.set_xlabel("seconds from noise to frames")


PICTURES: dict[str, tuple[Callable, Callable]] = {
    "forward": (forwards, draw_forwards),
    "efficiency": (lambda rows: [row for row in forwards(rows) if _scales(rows, row)], draw_efficiency),
    "video": (videos, draw_videos),
}


def _scales(rows: Sequence[Row], row: Row) -> bool:
    """Whether the model and resolution of a row were run on several numbers of GPUs."""
    same = [other for other in forwards(rows) if (other["size"], other["res"]) == (row["size"], row["res"])]
    return any(len(efficiency(seconds)) > 1 for seconds in by_label(same).values())


def _panels(figure: Figure, rows: Sequence[Row]) -> list[tuple[Axes, tuple[tuple[str, str], list[Row]]]]:
    found = cases(rows)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    return list(zip(axes, found.items(), strict=True))


def _bars(axis: Axes, series: dict[str, dict[int, float]]) -> None:
    counts = sorted({gpus for seconds in series.values() for gpus in seconds})
    width = 0.84 / len(series)
    for place, (name, seconds) in enumerate(series.items()):
        left = [counts.index(gpus) + (place - (len(series) - 1) / 2) * width for gpus in seconds]
        shade = SHADES[[other for other in series if _colour(other) == _colour(name)].index(name) % len(SHADES)]
        bars = axis.bar(
            left, list(seconds.values()), width, color=_colour(name), label=name, hatch=shade, edgecolor="white"
        )
        axis.bar_label(bars, [f"{s:.2f}" for s in seconds.values()], fontsize=7)
    axis.set_xticks(range(len(counts)), [f"{n} GPU{'s' if n > 1 else ''}" for n in counts])


def _colour(name: str) -> str:
    return COLOURS.get(name.split(",")[0], "#777777")


def save(path: Path, draw: Callable[[Figure, Sequence[Row]], None], rows: Sequence[Row], sources: str) -> None:
    """One picture with a legend for all panels, and what was measured where below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(max(6.4, 4.6 * len(cases(rows))), 4.2), layout="constrained")
    draw(figure, rows)
    entries = {}
    for axis in figure.axes:
        handles, texts = axis.get_legend_handles_labels()
        entries |= dict(zip(texts, handles, strict=True))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    gpus, days = sorted({row["gpu"] for row in rows}), sorted({row["date"] for row in rows})
    precisions = sorted({row["precision"] for row in rows})
    figure.supxlabel(
        f"{', '.join(gpus)}; {', '.join(precisions)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}; {sources}",
        fontsize=7,
        color="#555555",
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=[SHOWN], help="FILE or FILE:FIRST-LAST")
    parser.add_argument("--size", help="one model alone, such as 14b")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="a folder")
    options = parser.parse_args()
    try:
        sources = [Source.read(text) for text in options.sources]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = [row for source in sources for row in source.rows if options.size in (None, row.get("size"))]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error("matplotlib is not installed. Install it with: pip install matplotlib")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (choose, draw) in PICTURES.items():
        if chosen := choose(rows):
            save(options.out / f"{name}.png", draw, chosen, "; ".join(map(str, sources)))
            sys.stdout.write(f"{options.out / name}.png\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
