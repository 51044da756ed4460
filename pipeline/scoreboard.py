"""The table and the picture at the end of a sweep: its combinations, the best first.

sweep.csv   what each sets, whether it is done, and Dice of every class with its interval over patients
sweep.md    the same to read
sweep.png   a panel a class, a line a combination
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.files import replacing, write_csv, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNSCORED = "not scored yet"
"""The reason of a combination whose turn has not come."""

_LEAST_WIDTH = 0.02  # of the axis of Dice in the picture

Value = str | float | int | None
Scores = Mapping[str, Mapping[str, float | int | None]]


@dataclass(frozen=True)
class Entry:
    """A combination and its scores: class name -> `dice`, `dice_low`, `dice_high`; none where it failed for a `reason`.

    With both, the reason says why the scores are not those of all validation slides.
    """

    name: str
    values: Mapping[str, Any]
    scores: Scores
    reason: str = ""

    @property
    def dice(self) -> float | None:
        """The mean Dice of the classes that the truth has; None where it has none."""
        found = [fields["dice"] for fields in self.scores.values() if fields["dice"] is not None and fields["pixels"]]
        return float(np.mean(found)) if found else None

    @property
    def status(self) -> str:
        """`done`, `incomplete` where it is scored on a part of the slides, `failed`, or `open` before its turn."""
        if self.dice is not None or not self.reason:
            return "incomplete" if self.reason else "done"
        return "open" if self.reason == UNSCORED else "failed"


def ranked(entries: Sequence[Entry]) -> list[Entry]:
    """The best first, by mean Dice; then those scored on fewer slides; what has no score comes last."""
    return sorted(entries, key=lambda entry: (entry.dice is not None, not entry.reason, entry.dice or 0.0), reverse=True)


def write_scoreboard(folder: Path, entries: Sequence[Entry]) -> None:
    """Write sweep.csv, sweep.md and, where anything has scores, sweep.png, in the order of the entries."""
    rows = [_row(entry) for entry in entries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(folder / "sweep.csv", columns, [{name: row.get(name) for name in columns} for row in rows])
    shown = [name for name in columns if not name.startswith(("dice_low ", "dice_high "))]
    lines = [_line(shown), _line(["---"] * len(shown))]
    lines += [_line([_cell(row, name) for name in shown]) for row in rows]
    write_text(folder / "sweep.md", "\n".join(lines) + "\n")
    scored = [entry for entry in entries if entry.dice is not None]
    if scored:
        _draw(folder / "sweep.png", scored)
    else:
        (folder / "sweep.png").unlink(missing_ok=True)  # of an earlier call


def _row(entry: Entry) -> dict[str, Value]:
    row: dict[str, Value] = {"name": entry.name, **entry.values, "dice": entry.dice}
    for name, fields in entry.scores.items():
        row |= {f"{figure} {name}": fields[figure] for figure in ("dice", "dice_low", "dice_high")}
    return {**row, "status": entry.status, "reason": entry.reason}


def _cell(row: Mapping[str, Value], name: str) -> str:
    """A figure, with its interval if it is that of a class and has one."""
    value, figure, label = row.get(name), *name.partition(" ")[::2]
    if figure != "dice" or value is None:
        return "" if value is None else str(value).replace("|", r"\|").replace("\n", " ")
    low, high = (row.get(f"dice_{end} {label}") if label else None for end in ("low", "high"))
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw(path: Path, entries: Sequence[Entry]) -> None:
    """Dice of each combination with its interval, the first on top, a panel a class."""
    from matplotlib.figure import Figure

    classes, places = list(entries[0].scores), range(len(entries))
    figure = Figure(figsize=(3 + 2.5 * len(classes), 1.2 + 0.3 * len(entries)), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(classes), sharey=True, squeeze=False)[0], classes, strict=True):
        found = [_bounds(entry.scores[name]) for entry in entries]
        dice, low, high = np.array(found, np.float64).T
        panel.errorbar(dice, places, xerr=(dice - low, high - dice), fmt="o", markersize=4, capsize=2)
        panel.set(xlabel="Dice on validation slides", title=name, yticks=places)
        panel.set_yticklabels([entry.name for entry in entries])
        panel.grid(axis="x", alpha=0.3)
        _widen(panel)
    figure.axes[0].invert_yaxis()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _widen(panel: Axes) -> None:
    """Show at least so much of the axis of Dice that what differs by nothing lies side by side."""
    low, high = panel.get_xlim()
    missing = max(_LEAST_WIDTH - (high - low), 0) / 2
    panel.set_xlim(low - missing, high + missing)
    panel.ticklabel_format(axis="x", useOffset=False)
    panel.locator_params(axis="x", nbins=4)  # of numbers that have four digits, no more fit side by side


def _bounds(fields: Mapping[str, float | int | None]) -> tuple[float, float, float]:
    """Dice and the ends of its bar: nothing is drawn where there is none, a mere point where it has no interval."""
    dice = np.nan if fields["dice"] is None else float(fields["dice"])
    low, high = fields["dice_low"], fields["dice_high"]
    # the Dice of all patients may lie a little outside a percentile interval of few rounds
    return dice, dice if low is None else min(low, dice), dice if high is None else max(high, dice)
