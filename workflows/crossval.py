"""`fullfield crossval CONFIG`: one run per fold, and figures on patients that no network was trained on or chosen by."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import compute
from rich.table import Table

from pipeline.approval import require_means
from pipeline.assessment import SlideAssessment
from pipeline.assessment_file import FILE as ASSESSMENTS
from pipeline.assessment_file import read_assessments
from pipeline.cells import read_cells
from pipeline.cohort import Case, read_manifest, write_manifest
from pipeline.config import Config
from pipeline.errors import CheckpointError
from pipeline.files import put_aside, write_csv
from pipeline.folds import deal_folds, fold_cases, require_patients
from pipeline.geometry import Mpp
from pipeline.inputs import check_output
from pipeline.lineage import write_parts
from pipeline.metrics import POOLED, Report
from pipeline.progress import console, new_table, show
from pipeline.settings import SPLITS
from pipeline.specs import read_config
from pipeline.tally import FILE as TALLY
from pipeline.tally import read_tally
from pipeline.workspace import Workspace, adopt_tiles, open_within, open_workspace
from workflows.evaluate import FIGURES, LEFT_OUT, figure_text, interval_text, show_shapes, write_figures
from workflows.run import run_stages
from workflows.sweep import train_parts
from workflows.tile import tile_cohort

Content = Mapping[str, npt.NDArray[np.float64]]
_HELD_OUT = "out-of-fold"


def crossval(path: Path, overrides: Sequence[str], folds: int) -> int:
    """Cross-validate a configuration file; the exit code is 1 where a slide failed."""
    config = read_config(path, overrides)
    for number in range(1, folds + 1):
        require_means(_part(config, config.output / f"fold-{number}"))
    for cohort in sorted(config.output.glob("fold-*/cohort.csv")):
        check_output(_part(config, cohort.parent), read_manifest(cohort))
    with open_workspace(config, own="folds.csv") as workspace:
        require_patients({case.patient for case in _candidates(workspace)}, folds)
        failures = [tile_cohort(workspace)]
        console.print("folds.csv says who is held out, whatever split these areas are in")
        parts = _write_folds(workspace, folds)
        workspace.run.log_config(workspace.config.to_yaml(), workspace.config.digest())
        _train_ahead(workspace, parts)
        for part in parts:
            console.print(f"\n{part.output.name} of {folds}")
            with open_within(workspace, part) as fold:
                adopt_tiles(fold, workspace)
                failures.append(run_stages(fold))
        outputs = [part.output for part in parts]
        workspace.run.log_file(write_parts(workspace.output, workspace.config, outputs))
        failures.append(_publish(workspace, outputs))
        command = workspace.run.open_command()
    console.print(f"\nResults are in {config.output.absolute()}. The record opens with\n  {command}")
    return 1 if any(failures) else 0


def _train_ahead(workspace: Workspace, parts: Sequence[Config]) -> None:
    """Train the folds side by side where there are several workers, and each can train one by itself.

    One that fails beside others, perhaps for want of memory, goes on in its turn; failing again, it ends the command.
    """
    untrained = [part for part in parts if not (part.output / "model").exists()]
    if workspace.cluster.workers() > 1 and workspace.config.training.processes == 1:
        for folder, error in train_parts(workspace, untrained, "crossval").items():
            console.print(f"{folder.name} failed beside the others, and is tried again by itself: {error}")


def _write_folds(workspace: Workspace, folds: int) -> list[Config]:
    """Write folds.csv, and the cohort of every fold; returns the configurations of the folds."""
    config, cases = workspace.config, _partakers(workspace)
    content = _content(workspace.tiles, cases, config)
    held = deal_folds(content, folds, config.seed)
    shares = config.cohort.fractions
    val_share = shares.val / (shares.train + shares.val) if shares.val else 0.0
    cohorts = list[tuple[Case, ...]]()
    for patients in held:
        validated = {case.patient for cohort in cohorts for case in cohort if case.split == "val"}
        cohorts.append(fold_cases(cases, patients, content, val_share, config.seed, validated))
    rows = _fold_rows(held, content, config)
    _check_folds(workspace.output, _fold_of(held))
    parts = [_part(config, workspace.output / f"fold-{number}") for number in range(1, folds + 1)]
    for part, fold_cohort in zip(parts, cohorts, strict=True):
        check_output(part, fold_cohort)
    write_csv(workspace.output / "folds.csv", list(rows[0]), rows)
    workspace.run.log_file(workspace.output / "folds.csv")
    for number, (part, patients, fold_cohort) in enumerate(zip(parts, held, cohorts, strict=True), 1):
        console.print(f"fold {number} holds out {', '.join(sorted(patients))}")
        write_manifest(part.cohort.manifest, fold_cohort)
    return parts


def _part(config: Config, output: Path) -> Config:
    """The configuration of the fold in a folder."""
    cohort = config.cohort.model_copy(update={"manifest": output / "cohort.csv"})
    segmentation = config.segmentation.model_copy(update={"splits": ("test",)})
    return config.model_copy(update={"output": output, "cohort": cohort, "segmentation": segmentation})


def _fold_of(held: Sequence[Collection[str]]) -> dict[str, int]:
    """The number of the fold that holds out each patient."""
    return {patient: number for number, patients in enumerate(held, 1) for patient in patients}


def _check_folds(output: Path, folds: Mapping[str, int]) -> None:
    """Raise CheckpointError where the output is one of other folds."""
    path = output / "folds.csv"
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        before = {row.get("patient"): row.get("fold") for row in csv.DictReader(file)}
    if before != {patient: str(number) for patient, number in folds.items()}:
        remedy = "Choose another `output`, or delete this one to begin anew."
        raise CheckpointError(str(path), "patients dealt out otherwise", "these folds", remedy)


def _fold_rows(held: Sequence[Collection[str]], content: Content, config: Config) -> list[dict[str, object]]:
    """What folds.csv says: the fold of every patient, and the area of each class that the patient has."""
    folds = _fold_of(held)
    names, mm2 = config.class_list.names, (config.tiles.patch_size * config.network.mpp) ** 2 / 1e6
    return [
        {"patient": patient, "fold": folds[patient]}
        | {f"{name}, mm2": area * mm2 for name, area in zip(names, content[patient], strict=True)}
        for patient in sorted(content, key=lambda patient: (folds[patient], patient))
    ]


def _partakers(workspace: Workspace) -> list[Case]:
    """The candidates that have cells; says who is held back, and who left out."""
    cases = _candidates(workspace)
    if held_back := _held_back(workspace):
        console.print(f"held back, as the manifest names them as test: {', '.join(held_back)}")
    tiled = set(workspace.tiled(SPLITS))
    if missing := sorted(case.slide_id for case in cases if case not in tiled):
        console.print(f"left out, as they have no cells: {', '.join(missing)}")
    return [case for case in cases if case in tiled]


def _candidates(workspace: Workspace) -> list[Case]:
    """The annotated cases of all patients that are not held back."""
    held_back = _held_back(workspace)
    return [case for case in workspace.annotated(SPLITS) if case.patient not in held_back]


def _held_back(workspace: Workspace) -> list[str]:
    """The patients that the manifest itself names as test."""
    given = {case.slide_id: case.split for case in read_manifest(workspace.config.cohort.manifest)}
    return sorted({case.patient for case in workspace.cases if given[case.slide_id] == "test"})


def _content(tiles: Path, cases: Sequence[Case], config: Config) -> Content:
    """The extents of the classes in each patient, (C,), in cells; 0 for a patient without any."""
    names, patients = config.class_list.names, sorted({case.patient for case in cases})
    cells = read_cells(tiles, ["patient", *names])
    places = np.asarray(compute.index_in(cells["patient"], pa.array(patients, pa.string())).fill_null(len(patients)))
    extents = [np.bincount(places, np.asarray(cells[name]), len(patients) + 1)[:-1] for name in names]  # without all others
    return dict(zip(patients, np.stack(extents, axis=-1), strict=True))


def _publish(workspace: Workspace, folds: Sequence[Path]) -> int:
    """Pool what each fold counted on the patients that it held out: figures as of one evaluation, and the counts themselves.

    But the calibration error is the mean of the folds': pooled, one that is too sure would make up for one that is not.
    Returns 1 where a fold has counted nothing, since none of its slides could be segmented, else 0.
    """
    counted = [fold for fold in folds if (fold / TALLY).exists()]
    for fold in folds:
        if fold not in counted:
            console.print(f"{fold.name} has no figures, and is left out of those of all folds")
    rows = [row for fold in counted for row in _held_out(fold)]
    missing = {case.slide_id for case in _candidates(workspace)} - {row.slide_id for row in rows}
    workspace.run.note_names(LEFT_OUT, sorted(missing))
    if not counted:
        for name in FIGURES:
            put_aside(workspace.output / name)
        workspace.run.renew_metrics({}, [_HELD_OUT])
        return 1
    mpp = Mpp.square(read_tally(counted[0] / TALLY).mpp)
    figures = write_figures(workspace.output, rows, workspace.config, mpp)
    for name in FIGURES:
        workspace.run.log_file(workspace.output / name)
    pooled = figures.scores[_HELD_OUT][POOLED]
    intervals = {f"{_HELD_OUT} {bound} {name}": values[bound] for name, values in pooled.items() for bound in _BOUNDS}
    workspace.run.renew_metrics({**figures.headline(), **intervals}, [_HELD_OUT])
    show(_table(figures.scores))
    show_shapes(figures, workspace.config, "crossval")
    return 0 if len(counted) == len(folds) else 1


_BOUNDS = ("dice_low", "dice_high", "iou_low", "iou_high")


def _held_out(fold: Path) -> list[SlideAssessment]:
    """What a fold counted on the slides that it held out."""
    counted = [replace(row, split=_HELD_OUT) for row in read_tally(fold / TALLY).rows if row.split == "test"]
    return [replace(row, network=fold.name) for row in read_assessments(fold / ASSESSMENTS, counted)]


def _table(scores: Report) -> Table:
    columns = ("class", "Dice", "95 % interval", "IoU", "precision", "recall", "patients")
    shown = new_table("Patients held out, pooled over folds; intervals over patients", *columns)
    for name, values in scores[_HELD_OUT][POOLED].items():
        interval = interval_text(values["dice_low"], values["dice_high"])
        dice, *figures = (figure_text(values[key]) for key in ("dice", "iou", "precision", "recall"))
        shown.add_row(name, dice, interval, *figures, str(values["patients"]))
    return shown
