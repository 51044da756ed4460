"""Who is measured. Each contender segments one slide with one network in a process of its own, and gives one Run."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import tifffile

from benchmarks.inside import PATCH
from benchmarks.labels import Labels, Rows, differing
from benchmarks.models import make_onnx
from benchmarks.process import Usage, measure
from benchmarks.record import Key, Run
from benchmarks.slides import CELL, blobs
from pipeline.canvas import Canvas, open_canvas
from pipeline.classes import IGNORED
from pipeline.geometry import Roi
from pipeline.machine import cores, worker_environment
from pipeline.slide_job import CANVAS

_PATIENCE, _PATIENCE_MPX = 60.0, 2.0  # seconds, and more a megapixel, after which pyFAST hangs, as it sometimes does
_TRIES = 2


@dataclass(frozen=True)
class Task:
    """A slide, a model, the labels of one forward pass (.npy), and a folder for what is made and then dropped.

    `tile_size` is for the bare forward pass; `pyfast` is an interpreter that has pyFAST, None where it is left out.
    """

    key: Key
    slide: Path
    model: Path
    reference: Path
    folder: Path
    tile_size: int
    pyfast: Path | None

    @property
    def cache(self) -> dict[str, str]:
        """Environment in which Fullfield keeps what it compiles beside the bench's slides."""
        return {"XDG_CACHE_HOME": str(self.folder / "cache")}


def fullfield(precision: str, task: Task) -> Run:
    """`fullfield segment`, as a user calls it; after start-up: from planning a slide's tiles to its last file."""
    output, workers = task.folder / "output", task.key.workers
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "workflows", "segment", str(task.slide), "--model", str(task.model)]
    command += ["--output", str(output), "--precision", precision, *(["--workers", str(workers)] if workers else [])]
    used = measure(command, task.cache)
    if used.error:
        return Run(task.key, error=used.error)
    with (output / "slides.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    canvas = open_canvas(output / "slides" / task.slide.stem / CANVAS)
    found = _run(task, used, float(row["seconds"]), float(row["megapixels"]), _of_canvas(canvas))
    found = replace(found, tile_size=canvas.write_size, tiles=_tile_seconds(canvas))
    shutil.rmtree(output)
    return found


def inside(name: str, tuned: bool, precision: str, task: Task) -> Run:
    """One of `benchmarks.inside`, with the allocator as Fullfield sets it or as shipped."""
    labels = task.folder / "labels.npy"
    environment = worker_environment(cores()) if tuned else {"OMP_NUM_THREADS": str(cores())}
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "benchmarks.inside",
        name,
        task.slide,
        task.model,
        labels,
        precision,
        str(task.tile_size),
    ]
    used = measure(command, {**environment, **task.cache})
    if used.error:
        return Run(task.key, error=used.error)
    took = json.loads(used.output.splitlines()[-1])
    if name == "limit" and not task.reference.exists():
        labels = labels.replace(task.reference)
    found = _run(task, used, took["seconds"], took["megapixels"], Labels.open(labels).rows)
    if labels != task.reference:
        labels.unlink()
    return replace(found, tile_size=task.tile_size if name == "limit" else PATCH)


def pyfast(task: Task) -> Run:
    """pyFAST with the same network as ONNX, patches side by side; on a slide with glass, where it sees tissue."""
    try:
        model = make_onnx(task.model, PATCH)
    except Exception as error:  # noqa: BLE001 - whatever stops a peer is its row
        return Run(task.key, error=f"{type(error).__name__}: {error}")
    output = task.folder / "pyfast.tiff"
    area = "all" if task.key.share == 1 else "tissue"
    script = Path(__file__).with_name("pyfast_segmentation.py")
    megapixels = task.key.size**2 * task.key.share / 1e6
    command: list[str | Path] = [task.pyfast or sys.executable, script, task.slide, model, output, str(PATCH), area]
    for _ in range(_TRIES):
        used = measure(command, {"OMP_NUM_THREADS": str(cores())}, _PATIENCE + _PATIENCE_MPX * megapixels)
        if not used.error:
            break
    if used.error:
        return Run(task.key, error=used.error)
    took = next(json.loads(line) for line in reversed(used.output.splitlines()) if line.startswith("{"))
    labels = tifffile.imread(output, key=0)
    found = _run(task, used, took["seconds"], megapixels, _of_cells(labels, blobs(task.key.size // CELL, task.key.share)))
    output.unlink()
    return replace(found, tile_size=PATCH)


CONTENDERS: dict[str, Callable[[Task], Run]] = {
    "fullfield, exact": partial(fullfield, "exact"),
    "limit, exact": partial(inside, "limit", True, "exact"),
    "fullfield, fast": partial(fullfield, "fast"),
    "limit, fast": partial(inside, "limit", True, "fast"),
    "fullfield, fastest": partial(fullfield, "fastest"),
    "limit, fastest": partial(inside, "limit", True, "fastest"),
    "MONAI SlidingWindowInferer, as shipped": partial(inside, "sliding-window", False, "exact"),
    "MONAI SlidingWindowInferer, allocator tuned": partial(inside, "sliding-window", True, "exact"),
    "MONAI PatchInferer, AvgMerger, as shipped": partial(inside, "AvgMerger", False, "exact"),
    "MONAI PatchInferer, AvgMerger, allocator tuned": partial(inside, "AvgMerger", True, "exact"),
    "MONAI PatchInferer, ZarrAvgMerger, as shipped": partial(inside, "ZarrAvgMerger", False, "exact"),
    "MONAI PatchInferer, ZarrAvgMerger, allocator tuned": partial(inside, "ZarrAvgMerger", True, "exact"),
    "pyFAST": pyfast,
}


def _run(task: Task, used: Usage, seconds: float, megapixels: float, labels: Rows) -> Run:
    share = differing(labels, Labels.open(task.reference))
    return Run(
        task.key,
        whole=used.seconds,
        seconds=seconds,
        cpu_seconds=used.cpu_seconds,
        peak_bytes=used.peak_bytes,
        megapixels=megapixels,
        differ=share,
    )


def _of_canvas(canvas: Canvas) -> Rows:
    return lambda top, bottom: canvas.read_labels(Roi(0, top, canvas.lattice.width, bottom - top))


def _of_cells(labels: np.ndarray, tissue: np.ndarray) -> Rows:
    """Labels where cells are tissue, read a row of cells at a time: elsewhere pyFAST writes 0 and has seen nothing."""
    return lambda top, bottom: np.where(np.repeat(tissue[top // CELL], CELL), labels[top:bottom], IGNORED)


def _tile_seconds(canvas: Canvas) -> float:
    """From the canvas, which is made before tissue is looked for, to its last tile."""
    shards = canvas.label_shards(0)
    last = max(shards.path(place).stat().st_mtime for place in canvas.done())
    return last - (shards.folder / "zarr.json").stat().st_mtime
