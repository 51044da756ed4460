"""What may not be mixed is refused, what is not whole is made again, and neither costs what is there."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml

from pipeline import checkpoint, ensemble
from pipeline.architectures import build_network
from pipeline.canvas import open_canvas
from pipeline.classes import Class, Classes
from pipeline.cohort import Case
from pipeline.config_file import load_config
from pipeline.errors import CanvasError, CheckpointError, CohortError, SlideError
from pipeline.files import locked
from pipeline.footprint import with_footprint
from pipeline.inputs import training_facts, training_inputs
from pipeline.lineage import other_ways
from pipeline.network import ModelSpec
from pipeline.phantom import make_phantom
from pipeline.segmentation import Step, segment_slides
from pipeline.settings import ClusterSettings, EngineSettings, SegmentationSettings, TissueSettings
from pipeline.slide import open_slide
from pipeline.slide_job import CANVAS, FOUND_TISSUE, MADE, OpenedJob, SlideJob, _tissue_of, is_finished, is_segmented
from pipeline.slide_tasks import Part, finish_slide, get_ready, plan_slide, seal_slide, segment_block
from pipeline.tasks import Here
from pipeline.versions import Version
from pipeline.workspace import open_workspace
from workflows.__main__ import main
from workflows.promote import _job
from workflows.segment import segment
from workflows.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))
TORCH, HERE = EngineSettings(backend="torch"), ClusterSettings(workers=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small models with random weights."""
    folder, found = tmp_path_factory.mktemp("models"), []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=2.0, patch_size=64, width=4, depth=1)
        network = build_network(spec).eval()
        checkpoint.save(folder / str(seed), with_footprint(spec, network), network)
        found.append(folder / str(seed))
    return found


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.tiff"
    make_phantom(path, seed=4, width=901, height=703, mpp=1.0)
    return path


def run(scan: Path, models: list[Path], output: Path, tile_size: int | None = 128) -> int:
    return segment([scan], [str(model) for model in models], output, None, tile_size, HERE, TORCH)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "slides.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_tiles_of_a_model_that_took_another_s_place_are_not_mixed_in(models: list[Path], scan: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models[0], tmp_path / "model"))
    settings = SegmentationSettings(tile_size=128)
    job = SlideJob("scan", scan, None, model, tmp_path / "slides" / "scan", settings, TissueSettings(), TORCH)
    first, *others = plan_slide(job).blocks
    segment_block(job, first)
    shutil.rmtree(model)
    shutil.copytree(models[1], model)
    with pytest.raises(CanvasError, match="model"):
        segment_block(job, others[0])
    assert set(open_canvas(job.folder / CANVAS).done()) == set(first)


def test_what_was_begun_by_another_version_at_another_scale_or_with_other_tissue_is_refused(
    models: list[Path], scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SegmentationSettings(tile_size=128)
    job = SlideJob("scan", scan, None, models[0], tmp_path / "scan", settings, TissueSettings(), TORCH)
    plan_slide(job)

    def refused(other: SlideJob) -> list[str]:
        """The names of what differs."""
        with pytest.raises(CanvasError, match="made by another run") as caught:
            plan_slide(other)
        return [told.split()[0] for told in str(caught.value.found).split(", ")]

    assert refused(replace(job, mpp=1.0001)) == ["slide_mpp"]
    assert "tissue" in refused(replace(job, tissue=TissueSettings(max_hole_um2=0)))
    with pytest.raises(SlideError):
        plan_slide(replace(job, slide=tmp_path / "none.tiff", folder=tmp_path / "slides" / "none"))
    assert not (tmp_path / "slides").exists()  # not even a lock of it
    monkeypatch.setattr("pipeline.slide_job.__version__", "another")
    assert refused(job) == ["fullfield"]


def test_tissue_and_smallest_region_are_those_of_the_model_s_own_run(models: list[Path], scan: Path, tmp_path: Path) -> None:
    model, own = Path(shutil.copytree(models[0], tmp_path / "model")), TissueSettings(mpp=16.0, max_hole_um2=0)
    content = yaml.safe_load((model / "model.yaml").read_text())
    content["lineage"] = {"tissue": own.model_dump(), "min_region_um2": 1e9}
    (model / "model.yaml").write_text(yaml.safe_dump(content))
    assert run(scan, [model], tmp_path) == 0
    folder = tmp_path / "slides" / "scan"
    identity = json.loads((folder / "provenance.json").read_text())["identity"]
    assert TissueSettings(**json.loads(identity["tissue"])) == own
    assert json.loads((folder / "regions.geojson").read_text())["features"] == []


def test_an_output_of_other_models_is_refused_and_stays_as_it_was(
    models: list[Path], scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(scan, models[:2], tmp_path) == 0
    names = ("slides.csv", "lineage.json", "ensemble/ensemble.yaml", "slides/scan/provenance.json")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    with pytest.raises(CheckpointError, match="other models"):
        run(scan, models[1:], tmp_path)
    assert run(scan, models[2:], tmp_path) == 1
    assert "made by another run" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    shutil.rmtree(tmp_path / "slides" / "scan" / CANVAS)
    assert run(scan, models[2:], tmp_path) == 0
    assert not (tmp_path / "slides" / "scan" / "entropy.ome.tif").exists()


def test_what_is_missing_of_a_finished_slide_is_made_again(models: list[Path], scan: Path, tmp_path: Path) -> None:
    assert run(scan, models[:1], tmp_path) == 0
    folder = tmp_path / "slides" / "scan"
    outlines, canvas = (folder / "regions.geojson").read_bytes(), open_canvas(folder / CANVAS)
    probabilities = canvas.read_probabilities(canvas.lattice.roi)
    measurements = (folder / "measurements.csv").read_bytes()
    settings = SegmentationSettings(tile_size=128)
    job = SlideJob("scan", scan, None, models[0].absolute(), folder, settings, TissueSettings(), TORCH)
    for path in (folder / name for name in MADE):
        content = path.read_bytes()
        path.write_bytes(b"")
        assert not is_finished(job)
        path.write_bytes(content)
        assert is_finished(job)
    (folder / "regions.geojson").unlink()
    (folder / "measurements.csv").write_bytes(b"")  # as a machine that lost power may leave it
    assert run(scan, models[:1], tmp_path) == 0
    assert (folder / "regions.geojson").read_bytes() == outlines
    assert (folder / "measurements.csv").read_bytes() == measurements
    canvas.probability_shards(0).path(canvas.done()[0]).unlink()
    (folder / "provenance.json").write_text("{")
    assert run(scan, models[:1], tmp_path) == 0
    assert np.array_equal(canvas.read_probabilities(canvas.lattice.roi), probabilities)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", ["gone", "empty", "short"])
def test_a_damaged_tile_is_made_again_and_no_other(
    models: list[Path], scan: Path, tmp_path: Path, finished: bool, damage: str
) -> None:
    assert run(scan, models[:1], tmp_path) == 0
    folder = tmp_path / "slides" / "scan"
    canvas = open_canvas(folder / CANVAS)
    labels, (first, second, third, *_) = canvas.read_labels(canvas.lattice.roi), canvas.done()
    shards = canvas.label_shards(0), canvas.probability_shards(0)
    damaged = {path: path.read_bytes() for path in (shards[0].path(first), shards[1].path(second))}
    sound = [each.path(third) for each in shards]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sound]
    for path, content in damaged.items():
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "short" else b"")
    if not finished:
        (folder / "provenance.json").unlink()
    assert run(scan, models[:1], tmp_path) == 0
    assert {path: path.read_bytes() for path in damaged} == damaged
    assert np.array_equal(canvas.read_labels(canvas.lattice.roi), labels)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sound] == before


@pytest.fixture(scope="module")
def long_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is longer than the last level of a pyramid."""
    path = tmp_path_factory.mktemp("long") / "scan.tiff"
    make_phantom(path, seed=4, width=703, height=401, mpp=2.0)
    return path


def test_what_another_command_has_done_of_a_slide_is_left_as_it_is(
    models: list[Path], long_scan: Path, tmp_path: Path
) -> None:
    """Its pyramid may just be made of level 1, of which nothing may be missing at any moment."""
    settings = SegmentationSettings(tile_size=128)
    job = SlideJob("scan", long_scan, None, models[0], tmp_path / "scan", settings, TissueSettings(), TORCH)
    ours, theirs = plan_slide(job), plan_slide(job)
    block, canvas = ours.blocks[0], open_canvas(job.folder / CANVAS)
    arrays = [shards(level) for level in (0, 1) for shards in (canvas.label_shards, canvas.probability_shards)]

    def files() -> list[tuple[Path, int, int]]:
        paths = (array.path(place) for array in arrays for place in array.places())
        return [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]

    assert len(block) == 4 and theirs == ours
    assert segment_block(job, block).megapixels > 0
    before = files()
    assert len(before) == 2 * 4 + 2
    assert segment_block(job, block).megapixels == 0
    assert files() == before
    torn = canvas.label_shards(0).path(block[0])
    torn.write_bytes(torn.read_bytes()[:-1])
    assert segment_block(job, block).megapixels > 0
    assert files()[-2:] == before[-2:]
    torn.write_bytes(torn.read_bytes()[:-1])
    assert block[0] in plan_slide(job).blocks[0]
    assert not arrays[2].places() and not arrays[3].places()  # what follows from a torn tile is made anew


def test_a_damaged_pyramid_is_made_again(models: list[Path], long_scan: Path, tmp_path: Path) -> None:
    scan = long_scan
    assert run(scan, models[:1], tmp_path) == 0
    canvas = open_canvas(tmp_path / "slides" / "scan" / CANVAS)
    coarse = canvas.probability_shards(1).path((0, 0))
    content = coarse.read_bytes()
    coarse.write_bytes(content[:-1])
    assert run(scan, models[:1], tmp_path) == 0
    assert coarse.read_bytes() == content


def test_a_name_that_is_not_unicode_has_one_row(models: list[Path], scan: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/sl\xff.tiff"))
    shutil.copy(scan, odd)
    assert run(odd, models[:1], tmp_path / "out") == 0
    (first,) = rows(tmp_path / "out")
    assert float(first["megapixels"]) > 0
    assert run(odd, models[:1], tmp_path / "out") == 0
    assert rows(tmp_path / "out") == [first]


def test_a_name_that_leaves_no_room_for_those_made_of_it_is_refused(models: list[Path], scan: Path, tmp_path: Path) -> None:
    long, longer = (tmp_path / f"{'x' * length}.tiff" for length in (240, 241))
    for path in (long, longer):
        path.symlink_to(scan)
    assert run(long, models[:1], tmp_path / "out") == 0
    with pytest.raises(CohortError, match="names of up to 240 bytes"):
        run(longer, models[:1], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("one", "other"), [("S1", "S1"), ("S1", "s1"), ("Dr\u00fcse", "Dru\u0308se")])
def test_slides_that_would_have_one_folder_somewhere_are_refused(tmp_path: Path, one: str, other: str) -> None:
    """Though this file system may tell them apart: that of a Mac, or of Windows, would not."""
    slides = [tmp_path / "a" / f"{one}.svs", tmp_path / "b" / f"{other}.svs", tmp_path / "b" / "S2.svs"]
    with pytest.raises(CohortError, match=f"share the name {', '.join(sorted({one, other}))};"):
        segment(slides, [], tmp_path / "out", None, None, HERE, TORCH)


def test_a_missing_entropy_map_is_made_again(models: list[Path], scan: Path, tmp_path: Path) -> None:
    assert run(scan, models[:2], tmp_path) == 0
    entropy = tmp_path / "slides" / "scan" / "entropy.ome.tif"
    pixels = tifffile.imread(entropy)
    entropy.unlink()
    assert run(scan, models[:2], tmp_path) == 0
    assert np.ptp(pixels) > 0 and np.array_equal(tifffile.imread(entropy), pixels)


def test_another_smallest_region_is_followed(models: list[Path], scan: Path, tmp_path: Path) -> None:
    assert run(scan, models[:1], tmp_path) == 0
    outlines = (tmp_path / "slides" / "scan" / "regions.geojson").read_bytes()
    settings = SegmentationSettings(tile_size=128, min_region_um2=1e9)
    folder = tmp_path / "slides" / "scan"
    job = SlideJob("scan", scan, None, models[0].absolute(), folder, settings, TissueSettings(), TORCH)
    assert not is_finished(job)
    assert is_finished(replace(job, settings=SegmentationSettings(tile_size=128)))
    assert is_segmented(job) and not is_segmented(replace(job, model=models[1].absolute()))
    canvas, half = open_canvas(folder / CANVAS), replace(job, engine=EngineSettings(backend="torch", precision="fast"))
    assert [OpenedJob(each).provenance(canvas, 1.0)["exact"] for each in (job, half)] == [True, False]
    plan = plan_slide(job)
    assert not plan.finished and not plan.blocks
    finish_slide(job, Part("band", 0), plan.bands)  # the others are made by those who put all together
    finish_slide(job, Part("regions"), plan.bands)
    assert len(plan.bands) > 2 and (folder / "regions.geojson").read_bytes() != outlines
    assert run(scan, models[:1], tmp_path) == 0  # as the first time, after a kill in between
    assert (folder / "regions.geojson").read_bytes() == outlines


def test_outlines_are_put_together_though_another_command_has_cleared_the_bands_away(
    models: list[Path], scan: Path, tmp_path: Path
) -> None:
    folder, settings = tmp_path / "scan", SegmentationSettings(tile_size=128)
    job = SlideJob("scan", scan, None, models[0], folder, settings, TissueSettings(), TORCH)
    plan = plan_slide(job)
    for block in plan.blocks:
        segment_block(job, block)
    made = ("regions.geojson", "measurements.csv")
    for part in (*(Part("band", band) for band in plan.bands), Part("regions")):
        finish_slide(job, part, plan.bands)
    before = [(folder / name).read_bytes() for name in made]
    canvas = open_canvas(folder / CANVAS)
    canvas.label_shards(0).path((0, 0)).with_name("0.5f3a.partial").touch()  # left by a writer that was killed
    seal_slide(job, plan.tissue_mm2, plan.bands)
    assert not list(folder.rglob("*.partial")) and not is_finished(job)  # there is no pyramid yet
    finish_slide(job, Part("regions"), plan.bands)
    assert [(folder / name).read_bytes() for name in made] == before


def test_tissue_is_found_once_for_all_workers(models: list[Path], scan: Path, tmp_path: Path) -> None:
    settings = SegmentationSettings(tile_size=128)
    job = SlideJob("scan", scan, None, models[0], tmp_path / "scan", settings, TissueSettings(), TORCH)
    plan_slide(job)
    found, asked = OpenedJob(job).find_tissue(), _tissue_of.cache_info()
    kept = OpenedJob(job).tissue()
    assert np.array_equal(kept.mask, found.mask) and kept.lattice == found.lattice
    assert _tissue_of.cache_info() == asked


def test_a_slide_that_another_command_is_at_comes_last(models: list[Path], scan: Path, tmp_path: Path) -> None:
    settings = SegmentationSettings(tile_size=128)
    taken, free = (
        SlideJob(name, scan, None, models[0], tmp_path / name, settings, TissueSettings(), TORCH)
        for name in ("taken", "free")
    )
    told = list[str]()
    with ExitStack() as theirs:
        theirs.enter_context(locked(taken.folder, shared=True))
        for step in segment_slides([taken, free], Here()):
            if step.postponed:
                told.append(f"{step.job.slide_id} is postponed")
            if step.row is not None:
                told.append(f"{step.job.slide_id} is {step.row.status}")
                theirs.close()
    assert told == ["taken is postponed", "free is done", "taken is done"]


def test_who_seals_a_slide_has_it_alone_and_its_pyramid_is_made_by_one_at_a_time(
    models: list[Path], scan: Path, tmp_path: Path
) -> None:
    settings = SegmentationSettings(tile_size=128)
    job = SlideJob("scan", scan, None, models[0], tmp_path / "scan", settings, TissueSettings(), TORCH)
    get_ready(job)  # so that none is late for another reason
    plan = plan_slide(job)
    for block in plan.blocks:
        segment_block(job, block)
    with ThreadPoolExecutor() as others:

        def waits_for(theirs: AbstractContextManager[bool], task: Callable[..., object], *arguments: object) -> bool:
            with theirs:
                begun = others.submit(task, job, *arguments)
                waited = not wait([begun], timeout=0.3).done
            begun.result(timeout=60)
            return waited

        assert waits_for(locked(job.folder), segment_block, plan.blocks[0])
        assert waits_for(locked(job.folder), finish_slide, Part("tissue"), plan.bands)
        assert waits_for(locked(tmp_path / "scan.pyramid"), finish_slide, Part("pyramid"), plan.bands)
        assert waits_for(locked(job.folder, shared=True), seal_slide, plan.tissue_mm2, plan.bands)


def test_what_disk_does_not_tell_of_is_not_taken_for_glass(
    models: list[Path], scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may tell a machine late of what another has written, if that has looked for it before."""
    settings = SegmentationSettings(tile_size=128)
    job = SlideJob("scan", scan, None, models[0], tmp_path / "scan", settings, TissueSettings(), TORCH)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.slide_job.open_canvas", None)  # nobody looks for what is not there yet
        get_ready(job)
    plan = plan_slide(job)
    assert sum(plan.bands.values()) == sum(map(len, plan.blocks))
    for block in plan.blocks[1:]:
        segment_block(job, block)
    (row, _), *_ = plan.blocks[0]
    for part in (Part("band", row), Part("regions"), Part("pyramid")):
        with pytest.raises(CanvasError, match=f"of the {plan.bands[row]} tiles of row {row}.*run the same command again"):
            finish_slide(job, part, plan.bands)
    with pytest.raises(CanvasError, match=f"of row {row}"):
        seal_slide(job, plan.tissue_mm2, plan.bands)
    assert {path.name for path in job.folder.iterdir()} == {CANVAS, FOUND_TISSUE}


def test_a_list_of_slides_that_is_none_is_put_aside(models: list[Path], scan: Path, tmp_path: Path) -> None:
    assert run(scan, models[:1], tmp_path) == 0
    path = tmp_path / "slides.csv"
    for wrong in ("slide_id;grund\nä;ö\n".encode("latin-1"), path.read_bytes().rstrip(b"\n") + b",a remark\n"):
        path.write_bytes(wrong)
        assert run(scan, models[:1], tmp_path) == 0
        assert [row["slide_id"] for row in rows(tmp_path)] == ["scan"]
        assert (tmp_path / "slides.csv.old").read_bytes() == wrong


def test_a_row_that_another_command_has_written_since_is_kept(
    models: list[Path], scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scans = tmp_path / "out" / "slides.csv", [scan, Path(shutil.copy(scan, tmp_path / "scan-2.tiff"))]

    def steps(*arguments: Any) -> Iterator[Step]:
        for step in segment_slides(*arguments):
            yield step
            if step.row is not None and step.row.slide_id == "scan":
                path.write_text(path.read_text().replace(f"scan,{scan},done,", f"scan,{scan},failed,"))

    monkeypatch.setattr("workflows.segment.segment_slides", steps)
    assert segment(scans, [str(models[0])], tmp_path / "out", None, 128, HERE, TORCH) == 0
    assert {row["slide_id"]: row["status"] for row in rows(tmp_path / "out")} == {"scan": "failed", "scan-2": "done"}


def test_a_damaged_model_begins_nothing(models: list[Path], scan: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models[0], tmp_path / "model"))
    shutil.copy(models[1] / "weights.safetensors", model)  # whole, and fits
    for given in ([model], [models[1], model]):
        with pytest.raises(CheckpointError, match=r"weights.safetensors: found SHA-256"):
            run(scan, given, tmp_path / "out")
    shutil.copy(models[0] / "weights.safetensors", model)
    for text in ("{", "[]"):
        (model / "ancestry.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"ancestry.json: found broken JSON"):
            run(scan, [model], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_were_moved_go_on(models: list[Path], scan: Path, tmp_path: Path) -> None:
    moved = [Path(shutil.copytree(model, tmp_path / "before" / model.name)) for model in models[:2]]
    assert run(scan, moved, tmp_path / "out") == 0
    (tmp_path / "before").rename(tmp_path / "after")
    assert run(scan, [tmp_path / "after" / model.name for model in moved], tmp_path / "out") == 0


def test_folds_of_a_cross_validation_are_all_or_none(models: list[Path], scan: Path, tmp_path: Path) -> None:
    for number, model in enumerate(models[:2], start=1):
        shutil.copytree(model, tmp_path / f"fold-{number}" / "model")
    shutil.copytree(models[2], tmp_path / "fold-1-again" / "model")
    assert run(scan, [tmp_path], tmp_path / "out") == 0
    assert len(ensemble.members(tmp_path / "out" / "ensemble")) == 2
    (tmp_path / "fold-3").mkdir()
    with pytest.raises(CheckpointError, match=r"fold-3/model: found no model"):
        run(scan, [tmp_path], tmp_path / "other")


def test_one_pixel_is_verified(models: list[Path], tmp_path: Path) -> None:
    make_phantom(tmp_path / "dot.tiff", seed=4, width=2, height=2, mpp=1.0)
    assert verify(tmp_path / "dot.tiff", str(models[0]), None, TORCH, blend=False) == 0


def test_a_place_that_cannot_be_written_is_one_line(
    models: list[Path], scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    command = ["fullfield", "segment", str(scan), "--model", str(models[0]), "--output", str(tmp_path / "file")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line


def test_a_name_that_is_not_unicode_is_told_on_a_terminal_that_is(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/sl\xff.tiff")
    command = [sys.executable, "-m", "workflows", "inspect", odd]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("SlideError: ") and "sl\\udcff.tiff: found no such file" in done.stderr


def test_what_is_noted_of_an_error_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        error = SlideError("a.tiff", "this", "that", "Mend it.")
        error.add_note("The MLflow run could not be marked as FAILED")
        raise error

    monkeypatch.setattr("workflows.inspect.inspect", fail)
    monkeypatch.setattr("sys.argv", ["fullfield", "inspect", "a.tiff"])
    with pytest.raises(SystemExit) as ended:
        main()
    first, second = capsys.readouterr().err.splitlines()
    assert (ended.value.code, second) == (1, "The MLflow run could not be marked as FAILED")
    assert first.startswith("SlideError: a.tiff")


def test_brackets_in_a_path_are_shown(
    models: list[Path], scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "[x]" / "out [final]"
    assert run(scan, models[:1], output) == 0
    assert str(output / "slides.csv") in capsys.readouterr().out


@pytest.mark.parametrize(("name", "found"), [("", "a folder"), ("x" * 300, "too long"), ("none.tiff", "no such file")])
def test_what_is_no_file_is_an_error_of_that_slide(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(SlideError, match=found):
        open_slide(tmp_path / name)


def test_a_slide_changed_in_place_is_another(scan: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(scan, tmp_path / "scan.tiff"))
    (tmp_path / "cohort.csv").write_text("slide\nscan.tiff\n")
    example = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
    config, case = load_config(example, [f"cohort.manifest={tmp_path / 'cohort.csv'}"]), Case("scan", "p", copy)
    before = training_facts(config, [case])
    assert training_facts(config, [case]) == before
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    after = training_facts(config, [case])
    assert [name for name in before if before[name] != after[name]] == ["slide scan"]
    assert json.loads(after["slide scan"])[0] == "scan"


def test_a_manifest_without_splits_is_not_written_over(scan: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(f"slide,patient\n{scan},p\n")
    example = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
    overrides = [f"cohort.manifest={manifest}", f"output={tmp_path}", "cluster.workers=0"]
    with pytest.raises(CohortError, match="choose another `output`"), open_workspace(load_config(example, overrides)):
        pass
    assert manifest.read_text() == f"slide,patient\n{scan},p\n"
    assert [path.name for path in tmp_path.iterdir()] == ["cohort.csv"]


def test_the_order_of_a_manifest_tells_nothing(scan: Path, tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
    config = load_config(example)
    cases = [Case(name, name, scan, scan, "train") for name in ("a", "b")]
    assert training_inputs(config, cases) == training_inputs(config, cases[::-1]) != training_inputs(config, cases[:1])
    unknown = replace(cases[0], slide_id="c", patient="c", annotation=None)
    assert training_inputs(config, [*cases, unknown]) == training_inputs(config, cases), "nothing is learned from it"


def test_it_is_said_where_a_model_hands_on_another_way_than_a_run_has_now(models: list[Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models[0], tmp_path / "model"))
    content = yaml.safe_load((model / "model.yaml").read_text())
    content["lineage"] = {"flips": False, "min_region_um2": 50.0}
    (model / "model.yaml").write_text(yaml.safe_dump(content))
    example = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
    config = load_config(example, ["engine.flips=false", "segmentation.min_region_um2=50"])
    assert other_ways(model, config) == ""
    config = load_config(example, ["engine.flips=true", "segmentation.min_region_um2=50"])
    assert other_ways(model, config) == "flips False"


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_promote_blends_what_is_not_local_and_nothing_else(scan: Path, tmp_path: Path, norm: str) -> None:
    fields = {"architecture": "unet", "classes": CLASSES, "mpp": 2.0, "patch_size": 64, "width": 4, "depth": 1}
    spec = ModelSpec(**fields, norm=norm, halo=None if norm == "instance" else 0)
    network = build_network(spec).eval()
    checkpoint.save(tmp_path / "model", with_footprint(spec, network), network)
    example = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
    version = Version("m", "1", "run", tmp_path / "model")
    for blend in (True, False):
        config = load_config(example, [f"segmentation.blend={str(blend).lower()}"])
        job = _job(Case("scan", "p", scan), config, version, tmp_path)
        assert job.settings.blend == (norm == "instance")
