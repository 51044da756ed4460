"""Draws what was measured: Markdown tables and a plot, from the records on disk and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import Record, Run
from pipeline.files import replacing, write_text

SECTIONS = ("peers", "big", "growth", "huge", "dense")
OURS = "fullfield, exact"

TITLES = {"fcn": "small FCN (16 channels, 3 halvings)", "unet": "MONAI UNet (32 to 512 channels, 2 residual units)"}

_GIB = 2**30
_COLUMNS = (
    "contender | whole process, s | after start-up, s | CPU, s | Mpx/s | peak, GiB | labels that differ | "
    "whole, x fullfield | after start-up, x fullfield | tile, px"
)
_GROWTH_COLUMNS = (
    "slide | network | workers | Mpx segmented | whole process, s | after start-up, s | s per 1000 Mpx | CPU, s | "
    "peak, GiB | labels that differ"
)
_NOTES = """\
Medians; peaks are the highest of all runs. *Whole process* runs from the command to its end; *after start-up* leaves out
imports, workers and the choice of the tile size (fullfield: from planning the slide's tiles to the last file, the pyramid,
outlines and pictures included), loading and reading (limit and MONAI's sliding window, whose image is in memory already),
or importing (pyFAST). *Peak* is the resident memory of the largest process. *Labels that differ* are held against one
forward pass, where it was examined. *Limit* is the same engine over the same windows in memory, neither reading nor writing.
MONAI: patches of 1024 px, overlap 0.25 (gaussian in the sliding window). pyFAST: patches of 1024 px side by side; a run that
hangs is ended and tried once more."""


def write_report(folder: Path) -> None:
    """Write bench.md and bench.png into the folder that holds the records."""
    records = {name: Record.read(folder / f"{name}.json") for name in SECTIONS if (folder / f"{name}.json").is_file()}
    write_text(folder / "bench.md", "\n".join(markdown(records)) + "\n")
    figure = draw(records)
    with replacing(folder / "bench.png") as partial:
        figure.savefig(partial, format="png", dpi=120)


def median(runs: Sequence[Run]) -> Run:
    """The runs of one key as one: medians, but the highest peak and the most that differs; where one failed, that one."""
    failed = next((run for run in runs if run.error), None)
    if failed:
        return failed
    names = [field.name for field in fields(Run) if field.name not in ("key", "tile_size", "error")]
    middle = {name: statistics.median(getattr(run, name) for run in runs) for name in names}
    highest = {"peak_bytes": max(run.peak_bytes for run in runs), "differ": max(run.differ for run in runs)}
    return replace(runs[-1], **{**middle, **highest})


def medians(record: Record) -> list[Run]:
    """One run for each key, in the order in which keys were first run."""
    return [median(record.of(key)) for key in dict.fromkeys(run.key for run in record.runs)]


def markdown(records: dict[str, Record]) -> list[str]:
    """The lines of the report."""
    lines = ["# Measured with `make bench`", ""]
    for name, record in records.items():
        lines += [f"## {name}", "", "; ".join(f"{key}: {value}" for key, value in record.conditions.items()), ""]
        lines += _growth(medians(record)) if name in ("growth", "huge") else _contests(record)
        lines += _plans(record)
        lines += [line for remark in record.remarks for line in (remark, "")]
    return [*lines, _NOTES]


def _contests(record: Record) -> list[str]:
    lines = list[str]()
    for (size, share, network), group in groupby(
        medians(record), lambda run: (run.key.size, run.key.share, run.key.network)
    ):
        runs = {run.key.contender: run for run in group}
        count = max(len(record.of(run.key)) for run in runs.values())
        lines += [f"### {TITLES[network]}, {size} x {size} px, {share:.0%} tissue, up to {count} runs", ""]
        lines += _table(_COLUMNS, [_row(run, runs.get(OURS)) for run in runs.values()])
        found = [_efficiency(runs, precision) for precision in ("exact", "fast", "fastest")]
        lines += [*(line for line in found if line is not None), ""]
    return lines


def _row(run: Run, ours: Run | None) -> str:
    name = run.key.contender
    if run.error:
        return f"{name} | {_cell(run.error)}" + " |" * 8
    whole, after = (_times(getattr(run, part), getattr(ours, part, None)) for part in ("whole", "seconds"))
    return (
        f"{name} | {run.whole:.1f} | {run.seconds:.1f} | {run.cpu_seconds:.1f} | {run.megapixels / run.seconds:.2f} | "
        f"{run.peak_bytes / _GIB:.2f} | {run.differ:.3%} | {whole} | {after} | {run.tile_size}"
    )


def _times(seconds: float, ours: float | None) -> str:
    return f"{seconds / ours:.2f}" if ours else "-"


def _efficiency(runs: dict[str, Run], precision: str) -> str | None:
    """How near fullfield is to the bare forward pass of the same precision."""
    limit, found = runs.get(f"limit, {precision}"), runs.get(f"fullfield, {precision}")
    if limit is None or found is None or limit.error or found.error:
        return None
    return (
        f"- Efficiency at {precision} (limit / fullfield): {limit.seconds / found.seconds:.3f} after start-up, "
        f"{limit.seconds / found.tiles:.3f} over the tiles alone ({found.tiles:.1f} s)"
    )


def _growth(runs: Iterable[Run]) -> list[str]:
    return _table(_GROWTH_COLUMNS, [_growth_row(run) for run in runs])


def _growth_row(run: Run) -> str:
    key = run.key
    start = f"{key.size} px, {key.share:.0%} | {key.network} | {key.workers or 'usual'}"
    if run.error:
        return f"{start} | {_cell(run.error)}" + " |" * 6
    return (
        f"{start} | {run.megapixels:.0f} | {run.whole:.1f} | {run.seconds:.1f} | {1e3 * run.seconds / run.megapixels:.1f} | "
        f"{run.cpu_seconds:.1f} | {run.peak_bytes / _GIB:.2f} | {run.differ:.3%}"
    )


def _plans(record: Record) -> list[str]:
    lines = [
        f"- `fullfield plan`, {plan.size} px, {plan.share:.0%} tissue, {plan.network}: tiles of {plan.tile_size} px, "
        f"halo costs {plan.halo_cost:.3f} (pixels read / written), about {plan.seconds:.1f} s and "
        f"{plan.peak_bytes / _GIB:.2f} GiB"
        for plan in record.plans
    ]
    return [*lines, ""] if lines else []


def _table(columns: str, rows: Sequence[str]) -> list[str]:
    return [f"| {columns} |", "|---" * len(columns.split("|")) + "|", *(f"| {row} |" for row in rows), ""]


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def draw(records: dict[str, Record]) -> Figure:
    """What there is, one panel below the other: seconds of the contenders; seconds and memory against pixels."""
    peers = medians(records["peers"]) if "peers" in records else []
    grown = [run for name in ("growth", "huge") if name in records for run in medians(records[name]) if not run.error]
    panels: list[Callable[[Axes], None]] = []
    for network in dict.fromkeys(run.key.network for run in peers):
        runs = [run for run in peers if run.key.network == network]
        panels.append(partial(_bars, runs=runs, title=TITLES[network]))
    if grown:
        seconds, peaks = [run.whole for run in grown], [run.peak_bytes / _GIB for run in grown]
        panels.append(partial(_lines, runs=grown, label="whole process, s", values=seconds, yscale="log"))
        panels.append(partial(_lines, runs=grown, label="peak of the largest process, GiB", values=peaks, yscale="linear"))
    figure = Figure(figsize=(11, 4.5 * max(len(panels), 1)), layout="constrained")
    for panel, drawn in zip(figure.subplots(max(len(panels), 1), squeeze=False)[:, 0], panels, strict=False):
        drawn(panel)
    return figure


def _bars(panel: Axes, runs: Sequence[Run], title: str) -> None:
    """Whole processes on the smallest slide, the part after start-up darker."""
    smallest = min(run.key.size for run in runs)
    shown = [run for run in runs if run.key.size == smallest and not run.error]
    names = [run.key.contender for run in shown]
    colors = ["tab:green" if name.startswith("fullfield") else "tab:gray" for name in names]
    whole = panel.barh(names, [run.whole for run in shown], color=colors, alpha=0.4)
    panel.barh(names, [run.seconds for run in shown], color=colors)
    panel.bar_label(
        whole,
        [f"{run.seconds:.1f} s of {run.whole:.1f}, {run.peak_bytes / _GIB:.1f} GiB" for run in shown],
        padding=4,
    )
    panel.margins(x=0.4)
    panel.invert_yaxis()
    panel.set(title=f"{title}, {smallest} x {smallest} px", xlabel="s (dark: after start-up)")


def _lines(panel: Axes, runs: Sequence[Run], label: str, values: Sequence[float], yscale: str) -> None:
    """One line for each network and number of workers."""
    lines = dict[tuple[str, int], list[tuple[float, float]]]()
    for run, value in zip(runs, values, strict=True):
        lines.setdefault((run.key.network, run.key.workers), []).append((run.megapixels, value))
    for (network, workers), points in lines.items():
        name = f"{network}, {workers} worker{'s' if workers > 1 else ''}" if workers else f"{network}, huge slide"
        panel.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    panel.set(xlabel="Mpx segmented", ylabel=label, xscale="log", yscale=yscale)
    if yscale == "linear":
        panel.set_ylim(0, None)
    panel.legend()
