"""`fullfield segment SLIDE...`: segments slides with a trained model, exactly unless told to blend, and finishes what was
interrupted.

What only runs with a cohort need is imported where it is used, so that the command starts at once.
"""

from __future__ import annotations

import csv
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import ensemble
from pipeline.cluster import connect
from pipeline.cohort import LONGEST_ID, separator
from pipeline.errors import CheckpointError, CohortError
from pipeline.files import as_unicode, in_its_place, is_file, locked, put_aside, write_csv
from pipeline.geometry import Mpp
from pipeline.grid import round_up
from pipeline.lineage import add_models, cases_facts, models_facts, note_used
from pipeline.progress import console, progress
from pipeline.registry import fold_references, resolve_model
from pipeline.runtime import require_ability, settled, with_flips
from pipeline.segmentation import Row, segment_slides, with_tile_sizes
from pipeline.settings import ClusterSettings, EngineSettings, SegmentationSettings
from pipeline.slide import fallback_mpp, unused_mpp
from pipeline.slide_job import PROVENANCE, SlideJob, job_tile_size
from pipeline.stitching import stitching
from pipeline.tasks import Cluster
from pipeline.tiling import local_workers
from pipeline.tracking import Run

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


def segment(
    slides: Sequence[Path],
    models: Sequence[str],
    output: Path,
    mpp: float | None,
    tile_size: int | None,
    where: ClusterSettings,
    engine: EngineSettings,
    blend: bool = False,
    flips: bool | None = None,
) -> int:
    """Segment slides as the model's own run did, its tissue, smallest region and (`flips` None) flips; 1 where one failed.

    Several models answer as one; of what is looked for in slides, the first one's run decides.
    """
    output = output.absolute()
    _check_names(slides)
    if where.scheduler is None:  # else workers may see what this machine does not
        _check_there(slides)
    folders = [resolve_model(each).absolute() for model in models for each in fold_references(model)]
    found = [member for folder in folders for member in _checkpoints(folder)]
    spec, engine = ensemble.common_spec(found), with_flips(engine, found[0], flips)
    stitching(spec, blend)  # refuses what is not local before anything is begun
    if where.scheduler is None:  # else workers decide, which may compute otherwise
        _require_engine(settled(engine), found)
    facts = models_facts(found)  # refuses what is damaged before anything is begun
    folder = ensemble.gather(found, output / "ensemble")
    with locked(output / "slides.csv"):  # which may be refused: better before workers are started
        pass
    jobs = _jobs(slides, mpp, folder, output / "slides", SegmentationSettings(tile_size=tile_size, blend=blend), engine)
    if where.workers is None and where.scheduler is None:
        scale = Mpp.square(spec.mpp)
        where = where.model_copy(update={"workers": local_workers(((job.slide, job.mpp) for job in jobs), scale)})
    with connect(where) as cluster:
        console.print(f"Work is done by {cluster.description}")
        rows = run_jobs(jobs, cluster, output, where.worker_memory_gib, mpp)
    if any(row.status == "done" for row in rows):
        add_models(output, facts)
    return report(rows, output)


def _check_names(slides: Sequence[Path]) -> None:
    """Raise CohortError where two slides would have one folder on some file system, and where a name is too long for one."""
    ids = [slide.stem for slide in slides]
    if long := [name for name in ids if len(os.fsencode(name)) > LONGEST_ID]:
        expected = f"names of up to {LONGEST_ID} bytes"
        raise CohortError("fullfield segment", f"a slide named {long[0]}", expected, "Link to it by a shorter name.")
    folders = [unicodedata.normalize("NFC", name).casefold() for name in ids]  # as Macs and Windows tell them apart
    times = Counter(folders)
    if twice := sorted({name for name, folder in zip(ids, folders, strict=True) if times[folder] > 1}):
        shared = f"slides that share the name {', '.join(twice)}"
        expected = "names that differ, and not in capital letters or the encoding of accents alone"
        remedy = "Name each slide once, link to one by another name, or use two outputs."
        raise CohortError("fullfield segment", shared, expected, remedy)


def _check_there(slides: Sequence[Path]) -> None:
    """Raise CohortError where no slide is there at all, or a pattern has met nothing, so that the shell left it as it is."""
    missing = [slide for slide in slides if not is_file(slide)]
    patterns = [slide for slide in missing if set("*?") & set(slide.name)]
    if patterns or len(missing) == len(slides):
        which = (patterns or missing)[0]
        remedy = "A pattern that meets no file stands for nothing: correct it." if patterns else "Correct the path."
        raise CohortError(str(which), in_its_place(which), "a slide", remedy)


def _jobs(
    slides: Sequence[Path],
    mpp: float | None,
    model: Path,
    results: Path,
    settings: SegmentationSettings,
    engine: EngineSettings,
) -> list[SlideJob]:
    """A job for each slide, with the tissue and the smallest region of the run that trained the model."""
    tissue, record = ensemble.load_tissue(model), ensemble.load_run_record(model)
    own = settings.model_copy(update={"min_region_um2": record.get("min_region_um2", settings.min_region_um2)})
    return [
        SlideJob(slide.stem, slide, fallback_mpp(slide, mpp), model, results / slide.stem, own, tissue, engine)
        for slide in map(Path.absolute, slides)
    ]


def _checkpoints(folder: Path) -> list[Path]:
    """The models at a path: all folds of a cross-validation, the members of an ensemble, or the one that is there.

    Raises CheckpointError where a fold has no model yet.
    """
    numbers = sorted(int(name[1]) for path in folder.glob("fold-*") if (name := re.fullmatch(r"fold-(\d+)", path.name)))
    folds = [folder / f"fold-{number}" / "model" for number in numbers]
    for missing in (model for model in folds if not model.exists()):
        remedy = "Run the cross-validation to its end, or name the folds' models one by one."
        raise CheckpointError(str(missing), "no model", "one of every fold", remedy)
    return folds or list(ensemble.members(folder))


def segment_cohort(workspace: Workspace) -> int:
    """Segment the slides of a run's splits with the run's model; returns 1 where one failed, else 0."""
    from pipeline.workspace import slide_job

    config = workspace.config
    splits = config.segmentation.splits
    jobs = [slide_job(case, config) for case in workspace.cases if case.split in splits]
    if not jobs:
        console.print(f"segment: no slide in {', '.join(splits)}")
        return 0
    with workspace.run.child("segment") as run:
        if config.engine.precision != "exact":
            _approve_engine(workspace, run)
        rows = run_jobs(jobs, workspace.cluster, workspace.output, config.cluster.worker_memory_gib)
        if rows:
            run.log_file(workspace.output / "slides.csv")
        run.log_metrics({"failed": count_failed(rows)})
        if megapixels := sum(row.megapixels for row in rows):
            run.log_metrics({"megapixels": megapixels})
        for job, row in zip(sorted(jobs, key=lambda job: job.slide_id), rows, strict=True):
            if row.status == "done":
                run.log_file(job.folder / "overlay.png", f"slides/{job.slide_id}")
                run.log_file(job.folder / "measurements.csv", f"slides/{job.slide_id}")
                run.log_reference(f"{job.slide_id}.segmentation", job.folder / "segmentation.ome.zarr")
        done = {row.slide_id for row in rows if row.status == "done"}
        if used := [case for case in workspace.cases if case.slide_id in done]:
            workspace.run.log_file(note_used(workspace.output, cases_facts(used, workspace.cluster)))
    return report(rows, workspace.output)


def _require_engine(engine: EngineSettings, models: Sequence[Path]) -> None:
    """Raise EngineError where it is not installed, or a model was never approved for it; imports no library of engines."""
    if engine.precision == "exact":
        require_ability(engine)
        return
    from pipeline.approval import approval, require_approval

    for model in models:
        if approval(engine, model) is None:
            require_ability(engine)  # whoever cannot compute so need not be told how to have it approved
        require_approval(engine, model)


def _approve_engine(workspace: Workspace, run: Run) -> None:
    """Compare the run's engine with the exact one in a worker, print and log. Raises EngineError where it strays too far."""
    from pipeline.trial import approve_engine

    config, cases = workspace.config, workspace.tiled(("train", "val"))
    for backend, found, unread in workspace.cluster.stream(approve_engine, config, cases, workspace.tiles, workspace.model):
        passed_over = f"; passed over, since they cannot be read: {', '.join(unread)}" if unread else ""
        console.print(f"{config.engine.precision} with {backend} against exact: {found}{passed_over}")
        run.log_metrics(asdict(found))


def run_jobs(
    jobs: Sequence[SlideJob], cluster: Cluster, output: Path, memory_gib: float | None, mpp: float | None = None
) -> list[Row]:
    """Segment and keep `slides.csv` up to date as slides end; returns the rows of these jobs, by slide_id.

    `memory_gib` bounds the tiles of which nobody says how large they are; see `tiling.choose`. `mpp` is what was given for
    slides that state no scale: of those that do, rows tell that it is not used.
    """
    jobs = with_tile_sizes(jobs, cluster, memory_gib)
    sizes = sorted({round_up(job_tile_size(job), ensemble.load_spec(job.model).stride) for job in jobs})
    console.print(f"Tiles of {', '.join(map(str, sizes))} px")
    rows, started, megapixels = dict[str, Row](), time.monotonic(), 0.0
    with progress("segment: blocks", 0) as bar:
        for step in segment_slides(jobs, cluster):
            megapixels += step.megapixels
            bar.grow(step.blocks)
            if step.postponed:
                console.print(f"{step.job.slide_id}: another command is at it, so it comes last and waits for that")
            if step.row is not None:
                reason = "; ".join(filter(None, (step.row.reason, unused_mpp(step.job.slide, mpp))))
                rows[step.row.slide_id] = row = replace(step.row, reason=reason)
                _write_row(output / "slides.csv", row, step.skipped)
            speed = megapixels / (time.monotonic() - started)
            bar.advance(step.blocks_done, f"{len(rows)} of {len(jobs)} slides, {speed:.1f} Mpx/s")
    return [rows[name] for name in sorted(rows)]


def count_failed(rows: Sequence[Row]) -> int:
    """How many slides failed."""
    return sum(row.status == "failed" for row in rows)


def report(rows: Sequence[Row], output: Path) -> int:
    """Print a line for each slide that failed or has a remark, and one for all; returns 1 where one failed, else 0."""
    for row in rows:
        if row.reason:
            console.print(f"{row.status}: {row.slide_id}: {row.reason}")
    failed = count_failed(rows)
    console.print(
        f"segment: {len(rows) - failed} slides done, {failed} failed; {output / 'slides.csv'} lists what lies there"
    )
    return 1 if failed else 0


def _write_row(path: Path, row: Row, skipped: bool) -> None:
    """Write the row of a slide that ended into the list; all others that are there stay, perhaps from another command.

    A row says what lies in the slide's folder: that of a finished slide stays where nothing was done now, be it that the
    slide was `skipped`, or that what was asked for is refused.
    """
    names, written = [field.name for field in fields(Row)], as_unicode(row.slide_id)
    with locked(path):
        rows: dict[str, Mapping[str, object]] = {**_read_rows(path, names)}
        done = rows.get(written, {}).get("status") == "done"
        if done and (skipped or row.status == "failed" and (path.parent / "slides" / row.slide_id / PROVENANCE).exists()):
            return
        rows[written] = asdict(row)
        write_csv(path, names, [rows[name] for name in sorted(rows)])


def _read_rows(path: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The rows by slide_id; a list that somebody has changed, so that it cannot be gone on with, is put aside."""
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet may have saved it
            first = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=separator(first)))
        if rows and all(list(row) == names for row in rows):
            return {row["slide_id"]: row for row in rows}
    except (UnicodeDecodeError, csv.Error):
        pass
    console.print(f"{path} was not as Fullfield writes it: now {put_aside(path)}")
    return {}
