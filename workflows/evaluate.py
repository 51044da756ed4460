"""`fullfield evaluate CONFIG`: holds segmented slides against their annotations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from pipeline.assessment import SHAPE_SCORES, Assessment, Rules, SlideAssessment, assess, extended, overall_error
from pipeline.assessment_file import FILE as ASSESSMENTS
from pipeline.assessment_file import read_assessment, write_assessment, write_assessments
from pipeline.calibration import draw_reliability, reliability_rows
from pipeline.canvas import Canvas, open_canvas
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.errors import EngineError, OtherWayError, why
from pipeline.files import file_digest, put_aside, write_csv, write_json
from pipeline.folder import require_output
from pipeline.geometry import Mpp
from pipeline.lineage import cases_facts, note_used
from pipeline.metrics import POOLED, Report, few_patients, report, table
from pipeline.origin import source_digest
from pipeline.pictures import PICTURE_PIXELS, truth_beside_prediction, write_png
from pipeline.progress import console, new_table, progress, show
from pipeline.settings import SPLITS
from pipeline.slide import open_slide
from pipeline.slide_job import ASSESSMENT, CANVAS, PROVENANCE, TRUTH, SlideJob, require_segmented
from pipeline.sources import case_truth
from pipeline.specs import read_config, rest_index
from pipeline.tally import FILE as TALLY
from pipeline.tally import Tally, write_tally
from pipeline.truth import Truth
from pipeline.workspace import Workspace, log_inputs, open_workspace, slide_job

_CALIBRATION = ("calibration.csv", "reliability.png")
FIGURES = ("metrics.json", "metrics.csv", TALLY, ASSESSMENTS, *_CALIBRATION)
"""The files of a run's figures, in its output."""

LEFT_OUT = "fullfield.left_out"
"""The tag of an MLflow run that names the slides which are missing from its figures."""

_SHAPE_COLUMNS = (
    ("object_f1", "object F1"),
    ("object_dice", "object Dice"),
    ("object_hausdorff_um", "object HD, um"),
    ("hd95_um", "HD95, um"),
    ("nsd", "surface Dice"),
    ("froc", "FROC"),
)


@dataclass(frozen=True, eq=False)
class Figures:
    """The slides of each split, their scores, and the calibration error over all classes of each split."""

    splits: Mapping[str, Sequence[SlideAssessment]]
    scores: Report
    errors: Mapping[str, Mapping[str, float | None]]

    def headline(self) -> dict[str, float | None]:
        """What MLflow is told: pooled scores of every split and class, the calibration error, the number of slides."""
        metrics = {
            f"{split} {score} {name}": values[score]
            for split, slides in self.scores.items()
            for name, values in slides[POOLED].items()
            for score in ("dice", "iou", *SHAPE_SCORES)
        }
        metrics |= {f"{split} ece": error["ece"] for split, error in self.errors.items()}
        return metrics | {f"{split} slides": len(mine) for split, mine in self.splits.items()}


def evaluate(path: Path, overrides: Sequence[str]) -> int:
    """Run the stage by itself; the exit code is 1 where a slide could not be evaluated, or there was none."""
    config = read_config(path, overrides)
    require_output(config, "run")
    with open_workspace(config) as workspace:
        log_inputs(workspace)
        failed = evaluate_cohort(workspace)
        return failed if workspace.annotated(config.segmentation.splits) else 1


def evaluate_cohort(workspace: Workspace) -> int:
    """Write metrics, calibration and pictures of every annotated slide that was segmented; 1 where one was not.

    Where all were segmented with other settings, by the same model, or cannot have been with these, earlier figures stay.
    """
    config, rows, left_out, otherwise = workspace.config, list[SlideAssessment](), list[str](), False
    cases = workspace.annotated(config.segmentation.splits)
    for case in cases:
        workspace.cluster.submit(case, assess_case, case, config)
    with progress("evaluate: slides", len(cases)) as bar:
        for outcome in workspace.cluster:
            case = outcome.key
            if outcome.error is None:
                rows.append(SlideAssessment(case.slide_id, case.patient, case.split, outcome.value))
            else:
                console.print(f"evaluate: left out {case.slide_id}: {why(outcome.error, slide_job(case, config).folder)}")
                left_out.append(case.slide_id)
                otherwise |= isinstance(outcome.error, OtherWayError | EngineError)
            bar.advance()
    if otherwise and not rows:
        console.print("evaluate: figures that are there stay: they are not of these settings")
        return 1
    workspace.run.note_names(LEFT_OUT, sorted(left_out))
    if rows:
        _publish(workspace, sorted(rows, key=lambda row: row.slide_id))
    else:
        _put_aside(workspace)
        which = f"of {', '.join(config.segmentation.splits)} (segmentation.splits)"
        found = f"no annotated slide {which} could be evaluated" if cases else f"no slide {which} is annotated"
        console.print(f"evaluate: nothing to compare: {found}")
    return 1 if left_out else 0


def _put_aside(workspace: Workspace) -> None:
    """Rename the figures of an earlier call, perhaps of a model that is gone, and take them out of the MLflow run."""
    workspace.run.renew_metrics({}, SPLITS)
    with workspace.run.child("evaluate", anew=True):
        pass
    earlier = [name for name in FIGURES if (workspace.output / name).exists()]
    for name in earlier:
        put_aside(workspace.output / name)
    if earlier:
        console.print(f"evaluate: earlier figures are kept as {', '.join(f'{name}.old' for name in earlier)}")


def assess_case(case: Case, config: Config) -> Assessment:
    """Write a slide's truth.png, and count all that is scored, but where an earlier call has done both from the same.

    Raises CanvasError where the slide is not segmented.
    """
    job = slide_job(case, config)
    require_segmented(job)
    kept, picture, made_from = job.folder / ASSESSMENT, job.folder / TRUTH, _made_from(case, config, job)
    found = read_assessment(kept, made_from) if picture.is_file() else None
    if found is None:
        kept.unlink(missing_ok=True)  # the picture beside it is now drawn anew
        canvas, truth = open_canvas(job.folder / CANVAS), case_truth(case, config)
        write_png(picture, _picture(case, canvas, truth))
        found = assess(canvas, truth, _rules(config))
        write_assessment(kept, found, made_from)
    return found


def _made_from(case: Case, config: Config, job: SlideJob) -> dict[str, str]:
    """All that a segmented slide's assessment depends on, by name; the provenance has the identity of its canvas."""
    sections = config.model_dump(mode="json", include={"classes", "annotations"})
    return {
        "code": source_digest(),
        "provenance": file_digest(job.folder / PROVENANCE),
        "annotation": "" if case.annotation is None else file_digest(case.annotation),
        "rules": json.dumps(asdict(_rules(config))),
        **{name: json.dumps(section) for name, section in sections.items()},
    }


def _picture(case: Case, canvas: Canvas, truth: Truth) -> np.ndarray:
    """Slide, truth and prediction side by side, (rows, columns, 3) uint8 RGB. Raises SlideError."""
    level = next(index for index, item in enumerate(canvas.levels) if max(item.shape) <= PICTURE_PIXELS)
    lattice = canvas.levels[level]
    image = open_slide(case.slide, case.mpp).read(lattice.roi, lattice)
    labels = canvas.read_labels(lattice.roi, level)
    return truth_beside_prediction(image, truth.read(lattice.roi, lattice), labels, canvas.classes)


def _rules(config: Config) -> Rules:
    lesions = tuple(config.class_list.index(name) for name in config.evaluation.lesions)
    tolerance_um, min_area_um2 = config.evaluation.boundary_tolerance_um, config.segmentation.min_region_um2
    return Rules(rest_index(config), min_area_um2, tolerance_um, lesions)


def _publish(workspace: Workspace, rows: Sequence[SlideAssessment]) -> None:
    config, output = workspace.config, workspace.output
    canvas = open_canvas(output / "slides" / rows[0].slide_id / CANVAS)
    figures = write_figures(output, rows, config, canvas.lattice.mpp)
    with workspace.run.child("evaluate") as run:
        for whole_or_stage in (run, workspace.run):
            whole_or_stage.renew_metrics(figures.headline(), SPLITS)
        for name in FIGURES:
            run.log_file(output / name)
        for row in rows:
            run.log_file(output / "slides" / row.slide_id / TRUTH, f"slides/{row.slide_id}")
    assessed = {row.slide_id for row in rows}
    used = [case for case in workspace.cases if case.slide_id in assessed]
    workspace.run.log_file(note_used(output, cases_facts(used, workspace.cluster)))
    show(_score_table(figures.scores))
    show_shapes(figures, config, "evaluate")


def write_figures(output: Path, rows: Sequence[SlideAssessment], config: Config, mpp: Mpp) -> Figures:
    """Score assessed slides, whose pixels were counted at `mpp`, and write FIGURES into a folder."""
    classes, rest, samples, seed = config.class_list, rest_index(config), config.evaluation.bootstrap_samples, config.seed
    pixels = tuple(row.pixels for row in rows)
    scores = extended(report(pixels, classes, mpp, rest, samples, seed), rows, classes, rest, samples, seed)
    splits = {split: [row for row in rows if row.split == split] for split in scores}
    write_json(output / "metrics.json", scores)
    flat = table(scores)
    write_csv(output / "metrics.csv", list(flat[0]), flat)
    write_tally(output / TALLY, Tally(classes.names, rest, mpp.x, pixels))
    write_assessments(output / ASSESSMENTS, rows)
    figures = Figures(splits, scores, {split: overall_error(mine, samples, seed) for split, mine in splits.items()})
    _write_calibration(output, figures)
    return figures


def show_shapes(figures: Figures, config: Config, command: str) -> None:
    """Print the figures of objects, boundaries, lesions and calibration, and what a `command` is to say of intervals."""
    show(_shape_table(figures.scores))
    for remark in few_patients(figures.scores):
        console.print(f"{command}: {remark}")
    rows = [row for mine in figures.splits.values() for row in mine]
    if config.evaluation.lesions and (left_out := [row.slide_id for row in rows if not any(row.found.detections)]):
        reason = "FROC leaves out slides of which something that was examined is not known"
        console.print(f"{reason}, {len(left_out)} of {len(rows)}: {', '.join(left_out)}")
    for split, error in figures.errors.items():
        interval = interval_text(error["ece_low"], error["ece_high"])
        console.print(f"Calibration: expected error of probabilities, {split}: {figure_text(error['ece'])} ({interval})")


def _write_calibration(output: Path, figures: Figures) -> None:
    """The reliability table of every split as CSV, and the picture of it; networks are pooled, but for their error."""
    slides = figures.splits.items()
    counts = {split: np.sum([row.found.reliability.sum(axis=0) for row in rows], axis=0) for split, rows in slides}
    rows = [{"split": split, **row} for split, part in counts.items() for row in reliability_rows(part)]
    write_csv(output / _CALIBRATION[0], list(rows[0]), rows)
    draw_reliability(output / _CALIBRATION[1], counts, {split: error["ece"] for split, error in figures.errors.items()})


def _score_table(scores: Report) -> Table:
    columns = ("split", "class", "Dice", "95 % interval", "IoU", "precision", "recall")
    shown = new_table("Pooled over slides; intervals over patients", *columns)
    for split, slides in scores.items():
        for name, values in slides[POOLED].items():
            interval = interval_text(values["dice_low"], values["dice_high"])
            figures = (values[key] for key in ("iou", "precision", "recall"))
            shown.add_row(split, name, figure_text(values["dice"]), interval, *(figure_text(value) for value in figures))
    return shown


def _shape_table(scores: Report) -> Table:
    """Objects, boundaries and lesions of all classes that have any, each figure above its interval."""
    shown = [(split, name, values) for split, slides in scores.items() for name, values in slides[POOLED].items()]
    shown = [(split, name, values) for split, name, values in shown if values["objects"] is not None]
    columns = dict(_SHAPE_COLUMNS)
    if all(values["froc"] is None for _, _, values in shown):
        del columns["froc"]
    figures = new_table("Objects and boundaries", "split", "class", *columns.values())
    for split, name, values in shown:
        cells = []
        for score in columns:
            digits = 1 if score.endswith("_um") else 3
            interval = interval_text(values[f"{score}_low"], values[f"{score}_high"], digits)
            cells.append(f"{figure_text(values[score], digits)}\n{interval}")
        figures.add_row(split, name, *cells)
    return figures


def interval_text(low: float | None, high: float | None, digits: int = 3) -> str:
    """The bounds of an interval; a dash where there are none."""
    return "-" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"


def figure_text(value: float | None, digits: int = 3) -> str:
    """A score; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
