"""The commands, as a user calls them, on phantoms, real slides and damaged ones."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from pipeline import openvino_graph, runtime
from pipeline.canvas import open_canvas
from pipeline.classes import IGNORED
from pipeline.cohort import read_manifest
from pipeline.config_file import load_config
from pipeline.errors import TrainingError
from pipeline.geometry import Mpp
from pipeline.grid import Grid
from pipeline.phantom import make_cohort, make_phantom, render
from pipeline.registry import resolve_model
from pipeline.runtime import load_engine
from pipeline.settings import SegmentationSettings, TissueSettings
from pipeline.slide import open_slide
from pipeline.slide_job import SlideJob, is_finished
from pipeline.slide_tasks import plan_slide
from pipeline.snapshot import read_standing
from pipeline.store import open_store
from pipeline.tally import find_tally
from pipeline.tasks import Cluster
from pipeline.workspace import open_workspace, slide_job
from workflows.__main__ import main
from workflows.evaluate import assess_case
from workflows.train import train, train_model

FULLFIELD = [sys.executable, "-m", "workflows"]
ROOT = Path(__file__).parents[1]


def fullfield(*arguments: object, code: int = 0) -> str:
    """Run a command in this process, which has imported what it needs; returns what it printed, both streams.

    The environment stays: Dask leaves that of its workers, whose number of threads would have sums rounded otherwise.
    """
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), patch.dict(os.environ), pytest.MonkeyPatch.context() as replaced:
        replaced.setattr(sys, "argv", ["fullfield", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) == code, said.getvalue()
    return said.getvalue()


def fullfield_by_itself(*arguments: object, code: int = 0) -> str:
    """The same in a process of its own."""
    done = subprocess.run(
        [*FULLFIELD, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cohort of three small phantoms, a configuration, and the results of `fullfield run` on it."""
    folder = tmp_path_factory.mktemp("project")
    manifest = make_cohort(folder / "cohort", seed=3, slides=3, width=1501, height=1203, mpp=1.0)
    config = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    config["output"], config["cohort"]["manifest"] = str(folder / "out"), str(manifest)
    config["network"] = {"architecture": "fcn", "mpp": 4.0, "width": 8, "depth": 2}
    config["tiles"]["patch_size"] = 64
    config["training"] = {
        "epochs": 4,
        "patches_per_epoch": 64,
        "batch_size": 8,
        "learning_rate": 0.01,
        "weight_average": 0.8,
    }
    config["segmentation"] = {"tile_size": 96}
    config["cluster"] = {"workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "log.txt").write_text(fullfield_by_itself("run", folder / "config.yaml"))
    return folder


def slide_folder(project: Path) -> Path:
    return project / "out" / "slides" / "phantom-03"


def whole_pass(model: Path, slide: Path, mpp: float | None = None) -> np.ndarray:
    """Labels of one forward pass over a whole slide."""
    engine, scan = load_engine(model), open_slide(slide, mpp)
    grid = Grid(scan.base.at(Mpp.square(engine.spec.mpp)), 64, engine.spec.halo, engine.spec.stride)
    labels = engine(scan.read(grid.padded.roi, grid.lattice)[None])[0].argmax(0).astype(np.uint8)
    return labels[: grid.lattice.height, : grid.lattice.width]


def test_a_run_leaves_everything(project: Path) -> None:
    for name in (
        "config.yaml",
        "cohort.csv",
        "tiles.parquet",
        "slides.csv",
        "metrics.json",
        "metrics.csv",
        "confusions.json",
        "assessments.json",
        "lineage.json",
        "mlflow.db",
    ):
        assert (project / "out" / name).is_file(), name
    for name in ("calibration.csv", "reliability.png"):
        assert (project / "out" / name).is_file(), name
    model = {path.name for path in (project / "out" / "model").iterdir()}
    assert model == {"model.yaml", "network.json", "weights.safetensors", "ancestry.json"}
    expected = "segmentation.ome.zarr segmentation.ome.tif regions.geojson measurements.csv overlay.png tissue.png"
    assert {path.name for path in slide_folder(project).iterdir()} == {
        *expected.split(),
        *("provenance.json", "truth.png", "assessment.json"),
    }
    assert not list((project / "out").rglob("*.partial"))
    assert not list((project / "out").rglob("*.pkl"))
    assert "mlflow ui" in (project / "log.txt").read_text()


def test_what_one_backend_began_is_no_other_run_once_another_is_installed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(project / "out" / "config.yaml")
    cases = [case for case in read_manifest(project / "out" / "cohort.csv") if case.split in ("val", "test")]
    seen = set()
    for installed in (True, False):
        monkeypatch.setattr(openvino_graph, "installed", lambda installed=installed: installed)
        seen.add(runtime.settled(config.engine).backend)
        assert cases and all(is_finished(slide_job(case, config)) for case in cases)
    assert seen == {"torch", "openvino"}


def test_the_labels_are_those_of_one_forward_pass(project: Path) -> None:
    canvas = open_canvas(slide_folder(project) / "segmentation.ome.zarr")
    labels = canvas.read_labels(canvas.lattice.roi)
    reference = whole_pass(project / "out" / "model", project / "cohort" / "phantom-03.tiff")
    examined = labels != IGNORED
    assert examined.mean() > 0.6
    assert (labels == reference)[examined].all()
    assert (tifffile.imread(slide_folder(project) / "segmentation.ome.tif") == labels).all()


def test_the_figures_are_right(project: Path) -> None:
    scores = json.loads((project / "out" / "metrics.json").read_text())
    assert set(scores) == {"val", "test"}
    canvas = open_canvas(slide_folder(project) / "segmentation.ome.zarr")
    labels = canvas.read_labels(canvas.lattice.roi)
    from pipeline.annotations import open_truth
    from pipeline.specs import class_map

    config = load_config(project / "config.yaml")
    base = open_slide(project / "cohort" / "phantom-03.tiff").base
    truth = open_truth(project / "cohort" / "phantom-03.geojson", base, class_map(config), None)
    known = truth.read(canvas.lattice.roi, canvas.lattice)
    labels[labels == IGNORED] = 0
    for index, name in enumerate(canvas.classes.names):
        both = ((labels == index) & (known == index)).sum()
        said, true = ((labels == index) & (known != IGNORED)).sum(), (known == index).sum()
        dice = 2 * both / (said + true)
        assert scores["test"]["pooled"][name]["dice"] == pytest.approx(dice, abs=1e-6)
        assert scores["test"]["phantom-03"][name]["dice"] == pytest.approx(dice, abs=1e-6)
    with (project / "out" / "calibration.csv").open(newline="") as file:
        bins = list(csv.DictReader(file))
    for row in find_tally(str(project / "out")).rows:  # a slide a split
        counted = sum(int(found["pixels"]) for found in bins if found["split"] == row.split)
        assert counted == row.confusion[:, :-1].sum()


def test_running_again_continues_and_changes_nothing(project: Path) -> None:
    import mlflow

    model = (project / "out" / "model" / "weights.safetensors").read_bytes()
    log = fullfield("run", project / "config.yaml")
    assert log.count("done already") == 2
    assert (project / "out" / "model" / "weights.safetensors").read_bytes() == model
    client = mlflow.MlflowClient(f"sqlite:///{project / 'out' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("fullfield demo").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["evaluate", "out", "segment", "tile", "train"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    train = next(run for run in runs if run.info.run_name == "train")
    assert len(client.get_metric_history(train.info.run_id, "loss")) == 4


def test_a_heat_map_is_trained_and_stitched_too(project: Path, tmp_path: Path) -> None:
    overrides = ("network.architecture=heatmap", "network.depth=3", "training.epochs=1", "training.patches_per_epoch=16")
    fullfield("run", project / "config.yaml", f"output={tmp_path}", "tiles.patch_size=96", *overrides)
    canvas = open_canvas(tmp_path / "slides" / "phantom-03" / "segmentation.ome.zarr")
    assert canvas.lattice.mpp == Mpp.square(32.0)
    engine, scan = load_engine(tmp_path / "model"), open_slide(project / "cohort" / "phantom-03.tiff")
    grid = Grid(scan.base.at(Mpp.square(4.0)), 64, engine.spec.halo, engine.spec.stride)
    whole = engine(scan.read(grid.padded.roi, grid.lattice)[None])[0].argmax(0)
    labels = canvas.read_labels(canvas.lattice.roi)
    assert labels.shape == whole.shape == (-(-301 // 8), -(-376 // 8))
    assert (labels == whole)[labels != IGNORED].all()


def test_another_training_into_the_same_folder_is_refused(project: Path) -> None:
    log = fullfield("train", project / "config.yaml", "training.learning_rate=0.5", code=1)
    assert "CheckpointError" in log
    assert "Choose another `output`" in log


def test_the_registered_model_answers_like_the_engine(project: Path) -> None:
    import mlflow

    stored = resolve_model("models:/fullfield-demo@newest", f"sqlite:///{project / 'out' / 'mlflow.db'}").parents[1]
    patch = open_slide(project / "cohort" / "phantom-03.tiff")
    lattice = patch.base.at(Mpp.square(4.0))
    pixels = patch.read(lattice.roi, lattice)[None, :96, :128]
    served = mlflow.pyfunc.load_model(str(stored)).predict(pixels)
    assert np.abs(served - load_engine(project / "out" / "model")(pixels)).max() < 1e-6


def test_verify_proves_it_and_sees_a_wrong_halo(project: Path, tmp_path: Path) -> None:
    slide = project / "cohort" / "phantom-03.tiff"
    assert "exact: tiled equals whole" in fullfield_by_itself("verify", slide, "--model", project / "out" / "model")
    broken = shutil.copytree(project / "out" / "model", tmp_path / "model")
    text = (broken / "model.yaml").read_text()
    spec = yaml.safe_load(text)
    halo = spec["spec"]["halo"] if "spec" in spec else spec["halo"]
    believed = text.replace(f"halo: {halo}", "halo: 0").replace("spec_sha256", "#")
    (broken / "model.yaml").write_text(believed)
    assert "NOT exact" in fullfield("verify", slide, "--model", broken, code=1)


def test_damaged_slides_fail_and_the_healthy_one_does_not(project: Path, shared_data: Path, tmp_path: Path) -> None:
    healthy = project / "cohort" / "phantom-02.tiff"
    damaged = sorted((shared_data / "damaged").iterdir())
    log = fullfield(
        "segment", *damaged, healthy, "--model", project / "out" / "model", "--output", tmp_path, "--mpp", 1.0,
        "--workers", 1, code=1,
    )  # fmt: skip
    with (tmp_path / "slides.csv").open() as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        **{path.stem: "failed" for path in damaged},
        "phantom-02": "done",
    }
    for path in damaged:
        assert path.name in rows[path.stem]["reason"]
        assert sum(path.stem in line for line in log.splitlines()) == 1
    assert (tmp_path / "slides" / "phantom-02" / "provenance.json").exists()


def test_a_slide_without_scale_is_refused_and_works_with_one(project: Path, shared_data: Path, tmp_path: Path) -> None:
    """A small one works: to decode all JPEG 2000 tiles of the real one takes half a minute."""
    small = tmp_path / "small.tiff"
    tifffile.imwrite(small, render(5, 700, 500, 1.0, spread=3)[0], tile=(256, 256), photometric="rgb")
    options = ("--model", project / "out" / "model", "--output", tmp_path / "o", "--workers", 0)
    slides = [small, shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs"]
    for slide in slides:
        assert "--mpp" in fullfield("segment", slide, *options, code=1)
        assert not (tmp_path / "o" / "slides").exists()
    fullfield("segment", small, *options, "--mpp", 1, "--tile-size", 256)
    with (tmp_path / "o" / "slides.csv").open() as file:
        ended = {row["slide"]: row["status"] for row in csv.DictReader(file)}
    assert ended == {str(small): "done", str(slides[1]): "failed"}


def test_other_results_are_not_mixed_in(project: Path, tmp_path: Path) -> None:
    slide = project / "cohort" / "phantom-02.tiff"
    shutil.copy(slide, tmp_path / "slide.tiff")
    command = (
        "segment",
        tmp_path / "slide.tiff",
        "--model",
        project / "out" / "model",
        "--output",
        tmp_path / "o",
        "--workers",
        0,
    )
    fullfield(*command)
    make_phantom(tmp_path / "slide.tiff", seed=77, width=1501, height=1203, mpp=1.0)
    log = fullfield(*command, code=1)
    assert "made by another run" in log
    digest = open_slide(tmp_path / "slide.tiff").digest()
    assert re.search(rf"found slide [0-9a-f]+; expected slide {digest}\.", log.replace("\n", " "))
    folder, model = tmp_path / "o" / "slides" / "slide", project / "out" / "model"
    shutil.rmtree(folder / "segmentation.ome.zarr")
    (folder / "assessment.json").touch()
    job = SlideJob(
        "slide", tmp_path / "slide.tiff", None, model, folder, SegmentationSettings(tile_size=512), TissueSettings()
    )
    assert not plan_slide(job).finished
    assert not is_finished(job) and not (folder / "assessment.json").exists()
    assert not plan_slide(job).finished  # the old provenance does not vouch for the new canvas


def test_what_is_done_is_kept_in_the_list_of_slides(project: Path, tmp_path: Path) -> None:
    slides = [project / "cohort" / f"phantom-0{number}.tiff" for number in (1, 2)]
    common = ("--model", project / "out" / "model", "--output", tmp_path, "--workers", 0)
    fullfield("segment", slides[0], *common)
    first = (tmp_path / "slides.csv").read_text()
    fullfield("segment", slides[0], *common)
    assert (tmp_path / "slides.csv").read_text() == first
    (tmp_path / "slides.csv").write_text(first.replace(",done,", ",failed,"))
    fullfield("segment", slides[0], *common)
    first = (tmp_path / "slides.csv").read_text()
    assert ",done," in first and ",failed," not in first
    fullfield("segment", slides[1], *common)
    assert (tmp_path / "slides.csv").read_text().startswith(first)


def test_a_damaged_slide_of_a_cohort_is_left_out_and_told(project: Path, tmp_path: Path) -> None:
    manifest = (project / "out" / "cohort.csv").read_text()
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    (tmp_path / "cohort.csv").write_text(manifest + f"{tmp_path / 'broken.svs'},broken,,P9,train,\n")
    overrides = (f"output={tmp_path / 'out'}", f"cohort.manifest={tmp_path / 'cohort.csv'}")
    for state in ("new", "unchanged", "changed"):
        if state == "changed":
            (tmp_path / "broken.svs").write_bytes(b"no slide either")
        log = fullfield("tile", project / "config.yaml", *overrides, code=1)
        assert "left out broken" in log
        assert ("tile: done already" in log) == ("to try again what was left out" in log) == (state == "unchanged")
    assert (tmp_path / "out" / "tiles.parquet").exists()


def test_a_slide_that_was_damaged_later_is_left_out_of_the_figures(project: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(project / "out", tmp_path / "out"))
    cohort = Path(shutil.copytree(project / "cohort", tmp_path / "cohort"))
    broken = next(case for case in read_manifest(cohort / "cohort.csv") if case.split == "test")
    broken.slide.write_bytes(broken.slide.read_bytes()[:5000])
    overrides = (f"output={output}", f"cohort.manifest={cohort / 'cohort.csv'}")
    (other,) = (case for case in read_manifest(cohort / "cohort.csv") if case.split == "val")
    picture = output / "slides" / other.slide_id / "truth.png"
    picture.unlink()
    picture.mkdir()
    log = fullfield("evaluate", project / "config.yaml", *overrides, code=1)
    assert f"left out {broken.slide_id}: " in log
    assert f"left out {other.slide_id}: {picture}: found a folder" in log.replace("\n", " ")


def test_figures_of_what_lies_there_stay_where_another_way_is_asked_for(project: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(project / "out", tmp_path / "out"))
    figures = {name: (output / name).read_bytes() for name in ("metrics.json", "confusions.json", "reliability.png")}
    for command in ("evaluate", "run"):
        log = fullfield(command, project / "config.yaml", f"output={output}", "engine.flips=true", code=1).replace("\n", " ")
        assert "figures that are there stay" in log and "found engine " in log and f"delete {output}/slides/" in log
        assert {name: (output / name).read_bytes() for name in figures} == figures
    log = fullfield("evaluate", project / "config.yaml", f"output={output}", "engine.precision=fastest", code=1)
    assert "figures that are there stay" in log.replace("\n", " ")
    fullfield("evaluate", project / "config.yaml", f"output={output}")
    assert {name: (output / name).read_bytes() for name in figures} == figures


def test_slides_of_which_none_is_there_are_refused_before_anything_is_begun(project: Path, tmp_path: Path) -> None:
    common = ("--model", project / "out" / "model", "--output", tmp_path / "out", "--workers", 0)
    for missing, told in (("*.ndpi", "A pattern that meets no file"), ("none.svs", "no such file"), (".", "a folder")):
        assert told in fullfield("segment", tmp_path / missing, *common, code=1)
    assert not (tmp_path / "out").exists()


def test_a_list_of_slides_that_a_spreadsheet_has_saved_is_gone_on_with(project: Path, tmp_path: Path) -> None:
    slides, listed = [project / "cohort" / f"phantom-0{number}.tiff" for number in (1, 2)], tmp_path / "slides.csv"
    common = ("--model", project / "out" / "model", "--output", tmp_path, "--workers", 0)
    fullfield("segment", slides[0], *common)
    first = listed.read_text()
    listed.write_text(first.replace(",", ";"), encoding="utf-8-sig")
    fullfield("segment", slides[1], *common)
    assert listed.read_text().startswith(first) and len(listed.read_text().splitlines()) == 3


def test_what_the_manifest_alone_tells_is_told_before_slides_are_read(project: Path, tmp_path: Path) -> None:
    rows = (project / "out" / "cohort.csv").read_text().splitlines()
    (tmp_path / "cohort.csv").write_text("\n".join(rows).replace(",train,", ",test,").replace(",val,", ",test,"))
    overrides = (f"output={tmp_path / 'out'}", f"cohort.manifest={tmp_path / 'cohort.csv'}")
    log = fullfield("run", project / "config.yaml", *overrides, code=1).replace("\n", " ")
    assert "no annotated slide with the split `train`, and 3 with another" in log
    assert not (tmp_path / "out" / "tiles.parquet").exists()
    overrides = (f"output={tmp_path / 'cv'}", f"cohort.manifest={project / 'out' / 'cohort.csv'}")
    assert "9 or more" in fullfield("crossval", project / "config.yaml", *overrides, "--folds", 9, code=1)
    assert not (tmp_path / "cv" / "tiles.parquet").exists()


def test_a_configuration_of_a_moved_output_is_told_to_be_one(project: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(project / "out", moved)
    path = moved / "config.yaml"
    path.write_text(path.read_text().replace(str(project / "out"), str(tmp_path / "gone")))
    assert f"Say output={moved}" in fullfield("evaluate", path, code=1).replace("\n", " ")
    assert fullfield("evaluate", path, f"output={moved}")


def test_what_was_counted_on_a_slide_is_taken_until_anything_changes_on_which_it_depends(
    project: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(project / "out", tmp_path / "out"))
    (case,) = (case for case in read_manifest(output / "cohort.csv") if case.split == "test")
    annotation = Path(shutil.copy(case.annotation, tmp_path))
    case, folder = replace(case, annotation=annotation), output / "slides" / case.slide_id
    kept, truth, provenance = folder / "assessment.json", annotation.read_text(), (folder / "provenance.json").read_text()

    def is_counted(*overrides: str) -> bool:
        """Whether a slide is counted anew, of which a false count is kept; else that is what is taken."""
        before = json.loads(kept.read_text())
        kept.write_text(json.dumps({**before, "truth": "kept"}))
        config = load_config(project / "out" / "config.yaml", [f"output={output}", *overrides])
        found = assess_case(case, config)
        anew = found.truth != "kept"
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "truth": before["truth"]}))
        return anew

    assert not is_counted() and not is_counted("evaluation.bootstrap_samples=7", "training.epochs=99", "seed=1")
    for changed in ("evaluation.boundary_tolerance_um=9", "annotations.unnamed=Gland"):
        assert is_counted(changed) and not is_counted(changed)
    for file, text in ((annotation, truth), (folder / "provenance.json", provenance)):
        file.write_text(text + "\n")
        assert is_counted(changed)
    (folder / "truth.png").unlink()
    assert is_counted(changed) and (folder / "truth.png").exists() and not is_counted(changed)


def test_a_table_of_other_tiles_is_not_trained_on(project: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'out'}"
    assert "Run `fullfield tile` first" in fullfield("train", project / "config.yaml", output, code=1)
    fullfield("tile", project / "config.yaml", output)
    log = fullfield("train", project / "config.yaml", output, "network.mpp=3.0", code=1)
    assert "another cohort, configuration or version" in log


def test_a_killed_segmentation_is_finished_alike(project: Path, tmp_path: Path) -> None:
    """Client, scheduler and worker are killed twice; what is then finished is what one forward pass gives."""
    slide, model = tmp_path / "big.tiff", project / "out" / "model"
    make_phantom(slide, seed=5, width=3001, height=2403, mpp=1.0)
    command = ("segment", slide, "--model", model, "--output", tmp_path, "--workers", 1, "--tile-size", 192)
    folder = tmp_path / "slides" / "big"
    shards = folder / "segmentation.ome.zarr" / "labels" / "classes" / "0" / "c"
    for least in (1, 9):
        process = subprocess.Popen(
            [*FULLFIELD, *map(str, command)], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
        )
        deadline, found = time.monotonic() + 120, 0
        while found < least and time.monotonic() < deadline:
            time.sleep(0.005)
            found = len([path for path in shards.rglob("*") if path.is_file()])
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert found >= least
        assert not (folder / "provenance.json").exists()
    fullfield(*command)
    canvas = open_canvas(folder / "segmentation.ome.zarr")
    labels = canvas.read_labels(canvas.lattice.roi)
    examined = labels != IGNORED
    assert examined.mean() > 0.6
    assert (labels == whole_pass(model, slide))[examined].all()


def killed_options(project: Path, output: Path) -> tuple[str, ...]:
    """What a training of its own shares with the project's: all but the folder and the record."""
    tracking = {"uri": f"sqlite:///{project / 'out' / 'mlflow.db'}", "experiment": "killed", "model": "killed"}
    return f"output={output}", *(f"tracking.{key}={value}" for key, value in tracking.items())


@pytest.fixture(scope="module")
def killed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training that was killed in its third epoch of four."""
    output = tmp_path_factory.mktemp("killed") / "out"
    output.mkdir()
    shutil.copy(project / "out" / "tiles.parquet", output)
    command = [*FULLFIELD, "train", project / "config.yaml", *killed_options(project, output)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        standing = read_standing(output / "training.safetensors")
        if standing is not None and len(standing.records) == 2:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "model").exists()
    return output


def trainings(project: Path, output: Path) -> list[dict[str, object]]:
    """The stages of the run of an output folder: their names and statuses, and the history of what is no measure of time."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project / 'out' / 'mlflow.db'}")
    run = client.get_run(json.loads((output / "run.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    found = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    names = ("loss", "learning_rate", "dice")
    return [
        {
            "stage": child.data.tags["fullfield.stage"],
            "status": child.info.status,
            **{
                name: [(item.step, item.value) for item in client.get_metric_history(child.info.run_id, name)]
                for name in names
            },
        }
        for child in found
    ]


def test_a_killed_training_goes_on_to_the_same_bits(project: Path, killed: Path, tmp_path: Path) -> None:
    output = shutil.copytree(killed, tmp_path / "out")
    log = fullfield_by_itself("train", project / "config.yaml", *killed_options(project, output))
    assert "goes on after epoch 2" in log
    for path in (project / "out" / "model").iterdir():
        if path.name == "ancestry.json":  # tells when and in how many minutes, so not the same
            continue
        assert (output / "model" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(output.rglob("*.partial")) + list(output.glob("training*"))
    (undisturbed,) = [stage for stage in trainings(project, project / "out") if stage["stage"] == "train"]
    assert [step for step, _ in undisturbed["loss"]] == [1, 2, 3, 4]
    assert trainings(project, output) == [undisturbed]


def test_another_training_is_refused_until_the_interrupted_one_is_deleted(
    project: Path, killed: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(killed, tmp_path / "out", ignore=shutil.ignore_patterns("run.json"))
    options, state = [*killed_options(project, output), "training.epochs=1"], output / "training.safetensors"
    before = state.read_bytes(), (output / "config.yaml").read_bytes()
    with pytest.raises(TrainingError, match="an interrupted training of another, training.epochs was 4"):
        train(project / "config.yaml", options)
    assert (state.read_bytes(), (output / "config.yaml").read_bytes()) == before
    state.unlink()
    shutil.rmtree(output / "model.partial")
    train(project / "config.yaml", options)
    store = open_store(f"sqlite:///{project}/out/mlflow.db", create=False)
    run_id = json.loads((output / "run.json").read_text())["run_id"]
    assert load_config(store.fetch(run_id, "config.yaml", tmp_path, "it")) == load_config(output / "config.yaml")
    assert store.fetch(run_id, "cohort.csv", tmp_path, "it").read_bytes() == (output / "cohort.csv").read_bytes()
    (stage,) = trainings(project, output)
    assert [step for step, _ in stage["loss"]] == [1]
    assert yaml.safe_load((output / "model" / "model.yaml").read_text())["lineage"]["epoch"] == 1
    assert not list(output.glob("training*"))


class Relieved:
    """A cluster of which a worker dies after an epoch: Dask gives the same task to another, from its beginning."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cluster, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.cluster)

    def stream(self, *task: Any) -> Iterator[Any]:
        yield from islice(self.cluster.stream(*task), 1)
        yield from self.cluster.stream(*task)


def test_a_worker_that_takes_over_tells_no_epoch_twice(project: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    shutil.copy(project / "out" / "tiles.parquet", output)
    options = (*killed_options(project, output), "training.epochs=2")
    with open_workspace(load_config(project / "config.yaml", options)) as workspace:
        train_model(replace(workspace, cluster=Relieved(workspace.cluster)))
    (stage,) = trainings(project, output)
    assert [step for step, _ in stage["loss"]] == [1, 2]


def test_inspect_says_what_a_slide_is(project: Path, tmp_path: Path) -> None:
    slide = project / "cohort" / "phantom-01.tiff"
    whole = slide.read_bytes()
    assert "one that ends on .png" in fullfield("inspect", slide, "--picture", slide, code=1)
    assert slide.read_bytes() == whole
    facts = json.loads(fullfield("inspect", slide, "--json", "--picture", tmp_path / "slide.png"))
    assert (facts["width"], facts["height"]) == (1501, 1203)
    assert facts["mpp"] == pytest.approx([1.0, 1.0], rel=1e-3)
    assert 0.2 < facts["tissue_share"] < 0.95
    assert Image.open(tmp_path / "slide.png").size == (1501, 1203)
    assert "generic-tiff" in fullfield("inspect", slide)


def test_inspect_tells_of_a_missing_scale(shared_data: Path) -> None:
    facts = json.loads(fullfield("inspect", shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", "--json"))
    assert facts["mpp"] is None
    assert "--mpp" in facts["problem"]


def test_the_example_configuration_is_printed() -> None:
    assert yaml.safe_load(fullfield_by_itself("config", "example"))["network"]["mpp"] == 1.0
    assert "properties" in json.loads(fullfield("config", "schema"))


@pytest.mark.parametrize("command", ["run", "tile", "train", "evaluate"])
def test_a_bad_override_is_one_line_and_exit_code_1(project: Path, command: str) -> None:
    log = fullfield_by_itself(command, project / "config.yaml", "network.mpp=0", code=1)
    assert "`network.mpp`" in log
    assert "Traceback" not in log


def test_workers_are_the_schedulers_own(tmp_path: Path) -> None:
    where = ("--workers", 2, "--scheduler", "tcp://127.0.0.1:9")
    assert "Invalid value for --workers" in fullfield("segment", "a", "--model", "m", "--output", tmp_path, *where, code=2)


def test_a_model_that_is_none_is_named(project: Path, tmp_path: Path) -> None:
    log = fullfield(
        "segment", project / "cohort" / "phantom-01.tiff", "--model", tmp_path, "--output", tmp_path / "o", code=1
    )
    assert log.startswith(f"CheckpointError: {tmp_path}")
    assert "Traceback" not in log
