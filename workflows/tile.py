"""`fullfield tile CONFIG`: divides slides into cells and counts what there is to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import compute
from rich.table import Table

from pipeline.cells import read_cells
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.errors import AnnotationError, CohortError, SlideError, WorkerError
from pipeline.geometry import Mpp
from pipeline.grid import Grid
from pipeline.inputs import slide_digest
from pipeline.label_truth import LabelImageTruth
from pipeline.progress import console, new_table, progress
from pipeline.settings import SPLITS
from pipeline.slide import open_slide
from pipeline.slide_job import too_coarse
from pipeline.sources import case_truth
from pipeline.specs import read_config
from pipeline.tile_table import TileFacts, TileTable, columns, read_facts
from pipeline.tissue import find_tissue
from pipeline.tracking import Run
from pipeline.workspace import Workspace, log_inputs, open_workspace


@dataclass(frozen=True)
class Found:
    """What a slide holds: its rows of the table of tiles, and what there is to say of its scale and its annotations."""

    digest: str
    cells: pa.Table
    remarks: tuple[str, ...]


def tile(path: Path, overrides: Sequence[str]) -> int:
    """Run the stage by itself; the exit code is 1 where a slide could not be read."""
    with open_workspace(read_config(path, overrides)) as workspace:
        log_inputs(workspace)
        return tile_cohort(workspace)


def tile_cohort(workspace: Workspace) -> int:
    """Write tiles.parquet, one row per cell, of slides that are not counted there yet, and show what there is to learn from.

    A slide that cannot be read is named and left out, and not tried again until its file changes; returns 1 where there is
    one, else 0. Raises AnnotationError where annotations cannot be used, all of them in one message, and CohortError where
    one scan is in two splits or of two patients. What was counted by then need not be counted again.
    """
    config, cases = workspace.config, workspace.cases
    facts = read_facts(workspace.tiles)
    done = facts is not None and facts.is_of(config, cases) and not facts.to_count(cases)
    with workspace.run.child("tile") as run:
        if facts is None or not done:
            _check_twins(cases, config)
            facts = _count(workspace, run)
        areas = _areas(workspace.tiles, config)
        run.log_metrics({f"mm2 {split} {name}": area for (split, name), area in areas.items()})
        run.log_file(workspace.tiles)
    for name, slide in sorted(facts.left_out.items()):
        console.print(f"tile: left out {name}: {slide.why}")
    console.print("tile: done already" if done else _area_table(areas, config))
    if done and facts.left_out:
        console.print(f"tile: delete {workspace.tiles} to try again what was left out")
    return 1 if facts.left_out else 0


def _count(workspace: Workspace, run: Run) -> TileFacts:
    """Count what is not counted yet, log those slides as the run's data, and write the table, even where this fails."""
    table, unusable = TileTable(workspace.tiles, workspace.config, workspace.cases), list[str]()
    waiting = table.facts.to_count(workspace.cases)
    for case in waiting:
        workspace.cluster.submit(case, tile_case, case, workspace.config)
    try:
        with progress("tile: slides", len(waiting)) as bar:
            for outcome in workspace.cluster:
                case = outcome.key
                if outcome.error is None:
                    found = outcome.value
                    table.add(case, found.cells)
                    run.log_dataset(case.slide_id, found.digest, case.slide, case.split)
                    for remark in found.remarks:
                        console.print(f"tile: {case.slide_id}: {remark}")
                elif isinstance(outcome.error, SlideError | WorkerError):
                    table.leave_out(case, outcome.error)
                elif isinstance(outcome.error, AnnotationError):
                    unusable.append(str(outcome.error))
                else:
                    raise outcome.error
                bar.advance()
    finally:
        table.write(workspace.tiles)
    if unusable:
        problems, manifest = "\n  - ".join(["these problems:", *sorted(unusable)]), str(workspace.config.cohort.manifest)
        raise AnnotationError(manifest, problems, "annotations that can be read", "Correct them.")
    return table.facts


def _check_twins(cases: Sequence[Case], config: Config) -> None:
    """Raise CohortError where two cases are one scan that would be learned from and examined on."""
    scans = dict[str, Case]()
    for case in cases:
        digest = slide_digest(case.slide)
        other = scans.setdefault(digest, case) if digest is not None else case
        if (case.patient, case.split) != (other.patient, other.split):
            names = [f"{one.slide_id} (patient {one.patient}, {one.split})" for one in (other, case)]
            found, remedy = f"one scan as {' and as '.join(names)}", "Delete one of the rows, or give both one patient."
            raise CohortError(str(config.cohort.manifest), found, "a scan in one split, of one patient", remedy)


def tile_case(case: Case, config: Config) -> Found:
    """Count one slide: a row for each cell with enough tissue, with the share of it that is known and of every class.

    Rows are sorted by y and x.
    """
    slide = open_slide(case.slide, case.mpp)
    lattice, size = slide.base.at(Mpp.square(config.network.mpp)), config.tiles.patch_size
    tissue = find_tissue(slide, config.tissue)
    truth = case_truth(case, config) if case.annotation is not None else None
    corners, shares, fractions = list[tuple[int, int]](), list[float](), list[np.ndarray]()
    for cell in Grid(lattice, size, halo=0, stride=1):
        roi = cell.write_roi
        share = tissue.fraction(roi, lattice)
        enough = share >= config.tiles.min_tissue
        # Evaluation reads all of a label image, whose values show only as they are read: better now than after training.
        if not enough and not isinstance(truth, LabelImageTruth):
            continue
        counts = np.bincount(truth.read(roi, lattice).ravel(), minlength=256) if truth else np.zeros(256)
        if not enough:
            continue
        corners.append((roi.x, roi.y))
        shares.append(share)
        fractions.append(counts[: len(config.class_list.names)] / (size * size))
    coarse = too_coarse(slide.base.mpp, config.network.mpp)
    cells = _table(case, config, corners, shares, fractions)
    return Found(slide.digest(), cells, tuple(filter(None, (coarse, *(truth.remarks if truth else ())))))


def _table(
    case: Case, config: Config, corners: Sequence[tuple[int, int]], tissue: Sequence[float], fractions: Sequence[np.ndarray]
) -> pa.Table:
    """The rows of a slide: of each cell the top-left pixel, the share of tissue and that of each class, (classes,)."""
    ids = [[value] * len(corners) for value in (case.slide_id, case.patient, case.split)]
    x, y = ([corner[axis] for corner in corners] for axis in (0, 1))
    classes = [[float(shares[index]) for shares in fractions] for index in range(len(config.class_list.names))]
    known = [sum(shares.tolist()) for shares in fractions]
    return pa.table([*ids, x, y, tissue, known, *classes], schema=columns(config))


def _areas(path: Path, config: Config) -> dict[tuple[str, str], float]:
    """Area in mm2 for every split and class."""
    table, areas = read_cells(path, ["split", *config.class_list.names]), {}
    cell_mm2 = (config.tiles.patch_size * config.network.mpp) ** 2 / 1e6
    for split in SPLITS:
        own = np.asarray(compute.equal(table["split"], split))
        for name in config.class_list.names:
            areas[split, name] = float(np.asarray(table[name])[own].sum() * cell_mm2)
    return areas


def _area_table(areas: dict[tuple[str, str], float], config: Config) -> Table:
    table = new_table("Annotated area", "class", *(f"{split}, mm2" for split in SPLITS))
    for name in config.class_list.names:
        table.add_row(name, *(f"{areas[split, name]:.3f}" for split in SPLITS))
    return table
