"""`fullfield evaluate CONFIG`: holds segmented slides against their annotations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from pipeline.canvas import open_canvas
from pipeline.classes import IGNORED
from pipeline.cohort import Case
from pipeline.config import Config, load_config
from pipeline.errors import CanvasError
from pipeline.export import truth_beside_prediction, write_png
from pipeline.files import write_csv, write_text
from pipeline.geometry import Roi
from pipeline.metrics import POOLED, Report, SlideConfusion, confusion, report, table
from pipeline.progress import console, progress
from pipeline.segmentation import CANVAS, is_finished
from pipeline.slide import open_slide
from pipeline.tissue import PICTURE_PIXELS
from pipeline.workspace import Workspace, case_truth, open_workspace, rest_index, slide_job

_BLOCK = 2048  # pixels of truth and prediction compared at once


def evaluate(path: Path, overrides: Sequence[str]) -> int:
    """Run the stage by itself."""
    with open_workspace(load_config(path, overrides)) as workspace:
        return evaluate_cohort(workspace)


def evaluate_cohort(workspace: Workspace) -> int:
    """Write metrics.json, metrics.csv and pictures for every annotated slide that was segmented; 1 where one was not."""
    config, rows = workspace.config, list[SlideConfusion]()
    cases = workspace.annotated(config.segmentation.splits)
    for case in cases:
        workspace.cluster.submit(case, compare, case, config)
    missing = 0
    with progress("evaluate: slides", len(cases)) as bar:
        for outcome in workspace.cluster:
            if isinstance(outcome.error, CanvasError):
                console.print(f"evaluate: left out {outcome.error}", markup=False)
                missing += 1
            elif outcome.error is not None:
                raise outcome.error
            else:
                case = outcome.key
                rows.append(SlideConfusion(case.slide_id, case.patient, case.split, outcome.value))
            bar.advance()
    if rows:
        _publish(workspace, sorted(rows, key=lambda row: row.slide_id))
    else:
        console.print(f"evaluate: nothing to compare: no annotated slide of {config.segmentation.splits} is segmented")
    return 1 if missing else 0


def compare(case: Case, config: Config) -> np.ndarray:
    """Pixels by true and predicted class over all that is known of a slide; draws the picture on the way.

    Returns (classes, classes + 1) int64. Raises CanvasError where the slide is not segmented.
    """
    job = slide_job(case, config)
    if not is_finished(job):
        expected = "the finished segmentation of this slide by this model"
        raise CanvasError(str(job.folder), "none", expected, "Run `fullfield run` with this configuration.")
    canvas, truth = open_canvas(job.folder / CANVAS), case_truth(case, config)
    total = np.zeros((len(canvas.classes), len(canvas.classes) + 1), np.int64)
    for y in range(0, canvas.lattice.height, _BLOCK):
        for x in range(0, canvas.lattice.width, _BLOCK):
            roi = Roi(x, y, _BLOCK, _BLOCK).intersect(canvas.lattice.roi)
            known = truth.read(roi, canvas.lattice)
            if (known != IGNORED).any():
                total += confusion(known, canvas.read_labels(roi), len(canvas.classes))
    level = next(index for index, item in enumerate(canvas.levels) if max(item.shape) <= PICTURE_PIXELS)
    lattice = canvas.levels[level]
    image = open_slide(case.slide, case.mpp).read(lattice.roi, lattice)
    labels = canvas.read_labels(lattice.roi, level)
    picture = truth_beside_prediction(image, truth.read(lattice.roi, lattice), labels, canvas.classes)
    write_png(job.folder / "truth.png", picture)
    return total


def _publish(workspace: Workspace, rows: Sequence[SlideConfusion]) -> None:
    config = workspace.config
    canvas = open_canvas(workspace.output / "slides" / rows[0].slide_id / CANVAS)
    scores = report(
        rows, canvas.classes, canvas.lattice.mpp, rest_index(config), config.evaluation.bootstrap_samples, config.seed
    )
    write_text(workspace.output / "metrics.json", json.dumps(scores, indent=2) + "\n")
    flat = table(scores)
    write_csv(workspace.output / "metrics.csv", list(flat[0]), flat)
    with workspace.run.child("evaluate") as run:
        metrics = _headline(scores)
        run.log_metrics(metrics)
        workspace.run.log_metrics(metrics)
        run.log_table("metrics_table.csv", flat)
        for name in ("metrics.json", "metrics.csv"):
            run.log_file(workspace.output / name)
        for row in rows:
            run.log_file(workspace.output / "slides" / row.slide_id / "truth.png", f"slides/{row.slide_id}")
    console.print(_score_table(scores))


def _headline(scores: Report) -> dict[str, float | None]:
    """Pooled Dice and IoU of every split and class, for MLflow."""
    return {
        f"{split} {score} {name}": values[score]
        for split, slides in scores.items()
        for name, values in slides[POOLED].items()
        for score in ("dice", "iou")
    }


def _score_table(scores: Report) -> Table:
    columns = ("split", "class", "Dice", "95 % interval", "IoU", "precision", "recall")
    table = Table(*columns, title="Pooled over slides; intervals over patients", title_justify="left")
    for split, slides in scores.items():
        for name, values in slides[POOLED].items():
            low, high = values["dice_low"], values["dice_high"]
            interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            figures = (values[key] for key in ("iou", "precision", "recall"))
            table.add_row(split, name, _figure(values["dice"]), interval, *(_figure(value) for value in figures))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
