"""Cross-validation and sweeps on small phantoms: what they leave, that it is right, and that calling again does nothing."""

import csv
import json
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from pipeline.assessment import SHAPE_SCORES, SlideAssessment
from pipeline.checkpoint import digest
from pipeline.cohort import Case, read_manifest, write_manifest
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.ensemble import members
from pipeline.errors import AnnotationError, CheckpointError, CohortError, TrackingError, TrainingError
from pipeline.files import file_digest
from pipeline.fitting import fit
from pipeline.geometry import Mpp, Roi
from pipeline.metrics import POOLED, ratios
from pipeline.phantom import make_cohort, write_slide
from pipeline.registry import fold_references, resolve_model
from pipeline.scoreboard import Entry
from pipeline.settings import SPLITS, ClusterSettings, EngineSettings
from pipeline.slide import open_slide
from pipeline.sources import case_truth
from pipeline.store import open_store
from pipeline.tally import Tally, find_tally, write_tally
from pipeline.tile_table import read_facts
from pipeline.tissue import find_tissue
from pipeline.workspace import open_workspace
from workflows.crossval import _content, crossval
from workflows.evaluate import FIGURES, assess_case, evaluate, evaluate_cohort, write_figures
from workflows.reproduce import reproduce
from workflows.run import run
from workflows.segment import segment
from workflows.sweep import _remarks, sweep
from workflows.tile import tile_case, tile_cohort

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of five small phantoms of four patients, the last of which is for test, and a tiny network."""
    folder = tmp_path_factory.mktemp("experiments")
    manifest = make_cohort(folder / "cohort", seed=5, slides=5, width=1001, height=803, mpp=1.0)
    content = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    content["output"], content["cohort"] = str(folder / "out"), {"manifest": str(manifest)}
    content["network"] = {"architecture": "fcn", "mpp": 4.0, "width": 4, "depth": 1}
    content["tiles"]["patch_size"] = 64
    content["training"] = {"epochs": 2, "patches_per_epoch": 8, "batch_size": 4, "learning_rate": 0.01}
    content["segmentation"] = {"tile_size": 96}
    content["evaluation"] = {"bootstrap_samples": 50}
    content["cluster"] = {"workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def nested(output: Path, experiment: str = "fullfield demo") -> dict[str, list[str]]:
    """The names of the runs below each run, by name, all of which are FINISHED."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert {found.info.status for found in runs} == {"FINISHED"}
    names = {found.info.run_id: found.info.run_name for found in runs}
    below: dict[str, list[str]] = {}
    for found in runs:
        below.setdefault(names.get(found.data.tags.get("mlflow.parentRunId", ""), ""), []).append(found.info.run_name)
    return {name: sorted(children) for name, children in below.items()}


STAGES = ["evaluate", "segment", "tile", "train"]


@pytest.mark.usefixtures("one_thread")
def test_cross_validation_pools_what_each_fold_counted_on_patients_that_it_held_out(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, begun = tmp_path / "cv", time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.tasks.Here.workers", lambda _: 2)
        assert crossval(config, [f"output={output}"], 3) == 0
    given = {case.slide_id: case for case in read_manifest(config.parent / "cohort" / "cohort.csv")}
    held_back = {case.patient for case in given.values() if case.split == "test"}
    said = capsys.readouterr().out
    assert f"held back, as the manifest names them as test: {', '.join(held_back)}" in said
    assert said.count("train: validation looks at 0.05 of 0.10 Mpx") == 1, "two slides, of which one is enough"
    pooled, counts = find_tally(str(output)), dict[str, np.ndarray]()
    for number in (1, 2, 3):
        cases = read_manifest(output / f"fold-{number}" / "cohort.csv")
        splits = {case.split for case in cases}
        assert splits == {"train", "val", "test"}
        tested = {case.slide_id for case in cases if case.split == "test"}
        found = {row.slide_id: row.confusion for row in find_tally(str(output / f"fold-{number}")).rows}
        assert found.keys() == tested
        counts |= found
    assert counts.keys() == {name for name, case in given.items() if case.patient not in held_back}
    assert {row.patient for row in pooled.rows} == {case.patient for case in given.values()} - held_back
    for row in pooled.rows:
        assert (row.confusion == counts[row.slide_id]).all() and row.patient == given[row.slide_id].patient
    dice = ratios(np.sum(list(counts.values()), axis=0), pooled.rest)["dice"]
    scores = json.loads((output / "metrics.json").read_text())["out-of-fold"][POOLED]
    for index, name in enumerate(pooled.classes):
        assert scores[name]["dice"] == (None if np.isnan(dice[index]) else pytest.approx(dice[index]))
        assert scores[name]["patients"] == 3
    check_all_figures(output, tmp_path / "one")
    folds = ["fold-1", "fold-2", "fold-3"]
    assert [load_config(output / fold / "config.yaml").tracking.alias for fold in folds] == [f"cv-{fold}" for fold in folds]
    assert nested(output) == {"": ["cv"], "cv": sorted([*folds, "tile"]), **dict.fromkeys(folds, STAGES)}
    check_lineage(output, folds, begun)
    check_side_by_side(output, tmp_path / "alone")
    check_resumption(config, output, capsys)
    check_refusals(config, output)
    check_ensemble(output, tmp_path / "segmented", monkeypatch)


def check_all_figures(output: Path, other: Path) -> None:
    """They are, to the last digit, those of one evaluation of all slides that were held out; calibration is the folds'."""
    rows = []
    for number in (1, 2, 3):
        part = load_config(output / f"fold-{number}" / "config.yaml")
        tested = {case.slide_id: case for case in read_manifest(part.output / "cohort.csv") if case.split == "test"}
        rows += [
            SlideAssessment(name, case.patient, "out-of-fold", assess_case(case, part), f"fold-{number}")
            for name, case in sorted(tested.items())
        ]
    figures = write_figures(other, rows, load_config(output / "config.yaml"), Mpp.square(4.0))
    assert {path.name for path in other.iterdir()} == {*FIGURES}
    for name in FIGURES:
        assert (output / name).read_bytes() == (other / name).read_bytes(), name
    pooled = figures.scores["out-of-fold"][POOLED]
    assert sum(fields["objects"] or 0 for fields in pooled.values()) > 0
    run_id = json.loads((output / "run.json").read_text())["run_id"]
    logged = open_store(f"sqlite:///{output / 'mlflow.db'}", create=False).client.get_run(run_id).data.metrics
    assert logged["out-of-fold ece"] == figures.errors["out-of-fold"]["ece"]
    for name, fields in pooled.items():
        for score in ("dice_low", "object_f1", "hd95_um", "nsd", "ece"):
            assert logged.get(f"out-of-fold {score} {name}") == fields[score]


def check_lineage(output: Path, parts: Collection[str], begun: float) -> None:
    """Slides, splits, code and models of every part are told beside the whole, in its folder and in its MLflow run."""
    lineage, record = (json.loads((output / name).read_text()) for name in ("lineage.json", "run.json"))
    store = open_store(f"sqlite:///{output / 'mlflow.db'}", create=False)
    assert json.loads(Path(store.client.download_artifacts(record["run_id"], "lineage.json")).read_text()) == lineage
    elapsed = (time.monotonic() - begun) / 60 + 0.005  # since minutes are rounded
    assert lineage["parts"].keys() == set(parts) and lineage["origins"][0]["packages"]
    for name, part in lineage["parts"].items():
        cases = {case.slide_id: case for case in read_manifest(output / name / "cohort.csv")}
        assert {slide["slide_id"]: slide["split"] for slide in part["slides"]} == {
            slide_id: case.split for slide_id, case in cases.items()
        }
        for slide in part["slides"]:
            assert slide["annotation_digest"] == file_digest(cases[slide["slide_id"]].annotation)
        assert part["models"] == [{"path": str(output / name / "model"), "digest": digest(output / name / "model")}]
        assert part["origins"][0]["lock"] and 0 <= part["training"]["minutes"] <= elapsed


def check_side_by_side(output: Path, alone: Path) -> None:
    """All folds have begun to train before any has ended, and each became what it becomes by itself."""
    record = json.loads((output / "run.json").read_text())
    client = open_store(f"sqlite:///{output / 'mlflow.db'}", create=False).client
    trainings = [run for run in client.search_runs([record["experiment_id"]]) if run.info.run_name == "train"]
    assert max(run.info.start_time for run in trainings) < min(run.info.end_time for run in trainings)
    assert [len(client.get_metric_history(run.info.run_id, "loss")) for run in trainings] == [2, 2, 2]
    part = load_config(output / "fold-2" / "config.yaml")
    cases = [case for case in read_manifest(part.cohort.manifest) if case.split != "test"]
    epochs = list(fit(part, sorted(cases, key=lambda case: case.slide_id), part.output / "tiles.parquet", alone, ""))
    assert len(epochs) == 2
    assert (alone / "weights.safetensors").read_bytes() == (part.output / "model" / "weights.safetensors").read_bytes()


def check_refusals(config: Path, output: Path) -> None:
    """Other folds leave an output as it is; and the whole, which says what its runs are made of, is none itself."""
    before = (output / "folds.csv").read_bytes(), (output / "fold-2" / "cohort.csv").read_bytes()
    with pytest.raises(CheckpointError, match="patients dealt out otherwise"):
        crossval(config, [f"output={output}", "cohort.fractions={train: 1, val: 0, test: 0}"], 2)
    files = [output / name for name in ("config.yaml", "cohort.csv", *(f"fold-{fold}/cohort.csv" for fold in (1, 2, 3)))]
    kept = [path.read_bytes() for path in files]
    refused = {
        "training.epochs=9": r"training\.epochs \d; expected none, or one with training\.epochs 9",
        "cohort.fractions={train: 1, val: 0, test: 0}": "another cohort",
    }
    for other, told in refused.items():
        with pytest.raises(CheckpointError, match=f"a model that was trained with {told}"):
            crossval(config, [f"output={output}", other], 3)
        assert [path.read_bytes() for path in files][2:] == kept[2:]
        assert "9" not in other or [path.read_bytes() for path in files] == kept
    assert ((output / "folds.csv").read_bytes(), (output / "fold-2" / "cohort.csv").read_bytes()) == before
    with pytest.raises(
        CohortError, match=r"lineage\.json: found no slides, models; expected the lineage of a run.*a run of it"
    ):
        reproduce(str(output), output.with_name("again"))


def check_ensemble(output: Path, segmented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the whole in MLflow is the models of all of its folds, as its folder is, or none; alone it is no model."""
    address, run_id = f"sqlite:///{output / 'mlflow.db'}", json.loads((output / "run.json").read_text())["run_id"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    slide, where = read_manifest(output / "cohort.csv")[0].slide, ClusterSettings(workers=0)
    assert segment([slide], [f"runs:/{run_id}"], segmented, None, 96, where, EngineSettings()) == 0
    found = [digest(model) for model in members(segmented / "ensemble")]
    assert found == [digest(output / f"fold-{number}" / "model") for number in (1, 2, 3)]
    first, *_, last = fold_references(f"runs:/{run_id}")
    assert fold_references(first) == [first]
    with pytest.raises(TrackingError, match=rf"a run \(cv\) without a model.*such as {first} \(fold-1\)"):
        resolve_model(f"runs:/{run_id}")
    open_store(address, create=False).client.delete_run(last.removeprefix("runs:/"))
    with pytest.raises(TrackingError, match="found no fold-3; .*Run the cross-validation to its end"):
        fold_references(f"runs:/{run_id}")


def check_resumption(config: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fold goes on alone as the same run, and all together do nothing again; the tiles are those of the tile stage."""
    weights = (output / "fold-2" / "model" / "weights.safetensors").read_bytes()
    tiles = (output / "fold-2" / "tiles.parquet").read_bytes()
    (output / "fold-2" / "tiles.parquet").unlink()
    (output / "fold-2" / "assessments.json").unlink()
    capsys.readouterr()
    assert run(output / "fold-2" / "config.yaml", []) == 0
    assert "train: done already" in capsys.readouterr().out
    assert (output / "fold-2" / "tiles.parquet").read_bytes() == tiles
    assert not (output / "fold-2" / "mlflow.db").exists()
    before, scores = nested(output), (output / "metrics.json").read_bytes()
    assert crossval(config, [f"output={output}"], 3) == 0
    assert (output / "metrics.json").read_bytes() == scores
    said = capsys.readouterr().out
    for told in ("Objects and boundaries", "Calibration: expected error of probabilities, out-of-fold: "):
        assert told in said.rpartition("Patients held out")[2]
    assert said.count("train: done already") == 3 and said.count("tile: done already") == 4
    assert nested(output) == before
    assert (output / "fold-2" / "model" / "weights.safetensors").read_bytes() == weights


@pytest.mark.usefixtures("one_thread")
def test_a_slide_that_cannot_be_read_is_left_out_of_the_folds(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Path(shutil.copytree(config.parent / "cohort", tmp_path / "cohort"))
    cases = [case for case in read_manifest(cohort / "cohort.csv") if case.split != "test"]
    patients = [case.patient for case in cases]
    broken = next(case for case in cases if patients.count(case.patient) == 1)
    broken.slide.write_bytes(broken.slide.read_bytes()[:5000])
    overrides = [f"output={tmp_path / 'cv'}", f"cohort.manifest={cohort / 'cohort.csv'}"]
    trouble = {tmp_path / "cv" / "fold-1": TrainingError("training", "no memory for it", "enough", "Take smaller batches.")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.tasks.Here.workers", lambda _: 2)
        patch.setattr("workflows.crossval.train_parts", lambda *_: trouble)  # as where two have one GPU
        assert crossval(config, [*overrides, "cohort.fractions={train: 1, val: 0, test: 0}"], 2) == 1
    said = capsys.readouterr().out
    assert "fold-1 failed beside the others, and is tried again by itself: training: found no memory for it" in said
    assert f"left out, as they have no cells: {broken.slide_id}" in said
    found = {row.patient for row in find_tally(str(tmp_path / "cv")).rows}
    assert found == set(patients) - {broken.patient}
    assert (tmp_path / "cv" / "metrics.json").exists()
    run_id = json.loads((tmp_path / "cv" / "run.json").read_text())["run_id"]
    data = open_store(f"sqlite:///{tmp_path / 'cv' / 'mlflow.db'}", create=False).client.get_run(run_id).data
    assert (data.tags["fullfield.left_out"], data.metrics["out-of-fold slides"]) == (broken.slide_id, len(cases) - 1)


def test_the_folder_of_a_run_is_not_taken(config: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for verb in (
        lambda: crossval(config, [f"output={tmp_path}"], 2),
        lambda: sweep(config, [f"output={tmp_path}", "seed=1,2"]),
    ):
        with pytest.raises(CheckpointError, match="a folder of its own"):
            verb()


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_of_four_on_two_workers_ends_with_the_right_table(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, begun = tmp_path / "sweep", time.monotonic()
    values = ["training.learning_rate=1e-2,1e-4", "network.width=4,6", "training.epochs=1"]
    assert sweep(config, [f"output={output}", "cluster.workers=2", *values]) == 0
    assert "2 local Dask worker(s)" in capsys.readouterr().out
    rows = {row["name"]: row for row in rows_of(output / "sweep.csv")}
    names = [f"learning_rate={rate},width={width}" for rate in ("0.01", "0.0001") for width in (4, 6)]
    assert rows.keys() == set(names)
    for name in names:
        found, row = load_config(output / name / "config.yaml"), rows[name]
        assert (found.training.learning_rate, found.network.width) == tuple(
            float(row[key]) for key in ("training.learning_rate", "network.width")
        )
        assert found.training.epochs == 1
        tally = find_tally(str(output / name))
        assert {one.split for one in tally.rows} == {"val"}
        dice = ratios(np.sum([one.confusion for one in tally.rows], axis=0), tally.rest)["dice"]
        known = np.sum([one.confusion for one in tally.rows], axis=0).any(axis=1)
        assert float(row["dice"]) == pytest.approx(dice[known].mean())
        assert [float(row[f"dice {label}"] or "nan") for label in tally.classes] == pytest.approx(list(dice), nan_ok=True)
        assert (output / name / "model" / "weights.safetensors").is_file()
    order = [float(row["dice"]) for row in rows_of(output / "sweep.csv")]
    assert order == sorted(order, reverse=True) and len(set(order)) == 4
    assert (output / "sweep.png").stat().st_size > 0 and all(name in (output / "sweep.md").read_text() for name in names)
    check_lineage(output, names, begun)
    stages = dict.fromkeys(names, STAGES)
    assert nested(output) == {"": ["sweep"], "sweep": sorted([*names, "tile"]), **stages}
    kept = [(output / name).read_bytes() for name in ("config.yaml", "cohort.csv", "sweep.csv")]
    with pytest.raises(CheckpointError, match="a model that was trained with seed 0; expected none, or one with seed 5"):
        sweep(config, [f"output={output}", "seed=5", *values])
    assert [(output / name).read_bytes() for name in ("config.yaml", "cohort.csv", "sweep.csv")] == kept
    for name in ("model", "slides"):
        shutil.rmtree(output / names[1] / name)
    assert sweep(config, [f"output={output}", *values]) == 0
    again = {**stages, names[1]: sorted([*STAGES, "earlier train"])}
    assert nested(output) == {"": ["sweep"], "sweep": sorted([*names, "tile"]), **again}


def test_an_interrupted_sweep_leaves_nothing_running_and_its_folder_is_not_taken(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("workflows.sweep.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, [f"output={tmp_path / 'out'}", "network.width=4,6"])
    rows = {row["name"]: (row["status"], row["dice"]) for row in rows_of(tmp_path / "out" / "sweep.csv")}
    assert rows == {"width=4": ("open", ""), "width=6": ("open", "")}
    client = open_store(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}", create=False).client
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    ended = [(found.info.run_name, found.info.status) for found in runs if found.info.run_name != "tile"]
    assert sorted(ended) == [("out", "KILLED"), *[("train", "KILLED")] * 2, ("width=4", "KILLED"), ("width=6", "KILLED")]
    with pytest.raises(CheckpointError, match="the results of `fullfield sweep`"):
        run(config, [f"output={tmp_path / 'out'}"])


@pytest.mark.usefixtures("one_thread")
def test_a_combination_that_fails_is_a_row_with_its_reason_and_the_others_go_on(config: Path, tmp_path: Path) -> None:
    """One that lacks a slide to learn from is scored on all validation slides, and done."""
    cohort = Path(shutil.copytree(config.parent / "cohort", tmp_path / "cohort"))
    broken = [case.slide for case in read_manifest(cohort / "cohort.csv") if case.split == "train"][-1]
    broken.write_bytes(broken.read_bytes()[:5000])
    values = ["training.learning_rate=1e-2,1e30", "training.epochs=2", "training.warmup_epochs=0"]
    assert sweep(config, [f"output={tmp_path / 'out'}", f"cohort.manifest={cohort / 'cohort.csv'}", *values]) == 1
    good, failed = rows_of(tmp_path / "out" / "sweep.csv")
    assert (good["name"], good["status"]) == ("learning_rate=0.01", "done")
    assert (failed["status"], failed["dice"]) == ("failed", "")
    assert "loss" in failed["reason"]
    parts = json.loads((tmp_path / "out" / "lineage.json").read_text())["parts"]
    assert [len(parts[row["name"]]["models"]) for row in (good, failed)] == [1, 0]
    client = open_store(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}", create=False).client
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    ended = {(found.info.run_name, found.info.status) for found in runs}
    assert ("learning_rate=1e+30", "FAILED") in ended and ("train", "FAILED") in ended
    assert "RUNNING" not in {status for _, status in ended}


def test_a_training_without_a_cell_says_so(config: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path / 'out'}", "tiles.min_tissue=1", "tiles.patch_size=512"]  # larger than the slides
    with pytest.raises(TrainingError, match="no cell of an annotated slide to train on.*lower tiles.min_tissue"):
        run(config, overrides)


def test_a_combination_with_nothing_to_learn_from_is_a_row_too(config: Path, tmp_path: Path) -> None:
    fixed = ["training.epochs=1", "training.patches_per_epoch=8", f"output={tmp_path / 'out'}"]
    assert sweep(config, [*fixed, "tiles.min_tissue=0.05,1", "tiles.patch_size=512"]) == 1
    rows = {row["name"]: row for row in rows_of(tmp_path / "out" / "sweep.csv")}
    assert "no cell of an annotated slide" in rows["min_tissue=1"]["reason"]
    assert {name: row["status"] for name, row in rows.items()} == {"min_tissue=0.05": "done", "min_tissue=1": "failed"}


def test_a_sweep_need_not_have_what_its_combinations_say(config: Path, tmp_path: Path) -> None:
    """The file's depth does not go with the patches, that of either combination does."""
    fixed = [f"output={tmp_path / 'out'}", "tiles.patch_size=72", "training.epochs=1", "training.patches_per_epoch=8"]
    content = yaml.safe_load(config.read_text())
    content["network"]["depth"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert sweep(tmp_path / "config.yaml", [*fixed, "network.depth=1,2"]) == 0


def test_a_sweep_over_scales_says_that_its_scores_are_each_at_its_own(tmp_path: Path) -> None:
    entries = [Entry("broken", {}, {}, "the loss is nan")]
    for name, mpp in (("a", 1.8), ("b", 1.8), ("c", 2.5)):
        (tmp_path / name).mkdir()
        write_tally(tmp_path / name / "confusions.json", Tally(("Rest", "Gland"), 0, mpp, ()))
        entries.insert(-1, Entry(name, {}, {"Gland": {"dice": 0.5, "pixels": 9}}))
    assert list(_remarks(tmp_path, entries)) == ["a, c: each is scored at its own scale, 1.8 and 2.5 um/px"]
    assert list(_remarks(tmp_path, entries[-1:])) == []


def test_figures_of_a_model_that_is_gone_are_put_aside(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a cross-validation would pool them with those of the models that are there."""
    with open_workspace(load_config(config, [f"output={tmp_path / 'out'}"])) as workspace:
        figures = {"val": {"pooled": {"Gland": {"dice": 0.8, "iou": 0.7, **dict.fromkeys(SHAPE_SCORES)}}}}
        write_tally(workspace.output / "confusions.json", Tally(("Rest", "Gland"), 0, 1.0, ()))
        (workspace.output / "metrics.json").write_text(json.dumps(figures))
        with workspace.run.child("evaluate") as stage:
            for run in (workspace.run, stage):
                run.log_metrics({"val dice Gland": 0.8, "val ece": 0.1, "test iou Gland": 0.2, "disk": 0.5})
            stage.log_file(workspace.output / "confusions.json")
        run_id, store = workspace.run.run_id, workspace.run.store
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store.address)
        assert find_tally(f"runs:/{run_id}").rows == ()
        assert evaluate_cohort(workspace) == 1
    for name in ("confusions.json", "metrics.json"):
        assert not (tmp_path / "out" / name).exists()
        assert (tmp_path / "out" / f"{name}.old").exists()
    with pytest.raises(TrackingError, match="no confusions.json"):
        find_tally(f"runs:/{run_id}")
    data = store.client.get_run(run_id).data
    assert {name: value for name, value in data.metrics.items() if not np.isnan(value)} == {"disk": 0.5}
    wanted = {case.slide_id for case in workspace.annotated(SPLITS) if case.split != "train"}
    assert set(data.tags["fullfield.left_out"].split(", ")) == wanted
    assert "no annotated slide of val, test (segmentation.splits) could be evaluated" in " ".join(
        capsys.readouterr().out.split()
    )
    write_manifest(tmp_path / "cohort.csv", [replace(case, annotation=None) for case in workspace.cases])
    assert evaluate(config, [f"output={tmp_path / 'out'}", f"cohort.manifest={tmp_path / 'cohort.csv'}"]) == 1
    assert "no slide of val, test (segmentation.splits) is annotated" in " ".join(capsys.readouterr().out.split())
    assert "fullfield.left_out" not in store.client.get_run(run_id).data.tags


def test_tiles_of_another_division_are_not_adopted(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.workspace import adopt_tiles, open_within

    manifest = load_config(config, []).cohort.manifest.absolute()
    monkeypatch.chdir(manifest.parent)
    own = [f"cohort.manifest={manifest.name}", "tracking.uri=sqlite:///own.db"]
    whole_config = load_config(config, [f"output={tmp_path / 'whole'}", *own])
    with open_workspace(whole_config) as whole:
        left = load_config(whole.output / "config.yaml")  # works from wherever it is called
        assert (left.cohort.manifest, left.tracking.uri) == (manifest, f"sqlite:///{manifest.parent}/own.db")
        assert left.digest() == whole_config.digest()
        tile_cohort(whole)
        check_tiles(whole.tiles, whole_config, sorted(whole.cases, key=lambda case: case.slide_id))
        other = load_config(config, [f"output={tmp_path / 'part'}", "tiles.patch_size=96"])
        with open_within(whole, other) as part:
            adopt_tiles(part, whole)
            assert not part.tiles.exists()


def test_tiles_are_adopted_slide_by_slide(config: Path, tmp_path: Path) -> None:
    from pipeline.workspace import adopt_tiles

    cases = list(read_manifest(config.parent / "cohort" / "cohort.csv"))
    broken = replace(cases[0], slide_id="broken", patient="broken", slide=tmp_path / "broken.svs", annotation=None)
    broken.slide.write_bytes(b"no slide")
    write_manifest(tmp_path / "cohort.csv", [*cases, broken])
    overrides = [f"output={tmp_path / 'whole'}", f"cohort.manifest={tmp_path / 'cohort.csv'}"]
    with open_workspace(load_config(config, overrides)) as whole:
        assert tile_cohort(whole) == 1
    good = [case for case in whole.cases if case.slide_id != "broken"]
    dealt = [replace(case, split="test" if case.split == "train" else "train") for case in good[1:]]
    strangers = [replace(good[0], slide_id="stranger"), replace(good[0], mpp=2.0), replace(good[0], annotation=None)]

    def adopted(name: str, cases: Sequence[Case]) -> tuple[set[tuple[str, str]], set[str], list[Case]]:
        """The slides with their splits in the table that a part adopts, those that it leaves out, and what is to count."""
        part = replace(whole, config=whole.config.model_copy(update={"output": tmp_path / name}), cases=tuple(cases))
        adopt_tiles(part, whole)
        table, facts = parquet.read_table(part.tiles), read_facts(part.tiles)
        rows = set(zip(table["slide_id"].to_pylist(), table["split"].to_pylist(), strict=True))
        return rows, set(facts.left_out), facts.to_count(cases)

    assert adopted("same", whole.cases) == ({(case.slide_id, case.split) for case in good}, {"broken"}, [])
    fold = {(case.slide_id, case.split) for case in dealt}
    assert adopted("fold", dealt[1:]) != adopted("fold", dealt) == (fold, set(), []), "in place of one that no longer serves"
    for number, stranger in enumerate(strangers):
        rows, _, missing = adopted(f"stranger {number}", [*good[1:], stranger])
        assert rows == {(case.slide_id, case.split) for case in good[1:]} and missing == [stranger]
    broken.slide.write_bytes(b"NO SLIDE")
    assert adopted("later", whole.cases)[1:] == (set(), [case for case in whole.cases if case.slide_id == "broken"])
    assert adopted("later fold", dealt) == (fold, set(), [])


def test_only_what_has_changed_is_tiled_again(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = Path(shutil.copytree(config.parent / "cohort", tmp_path / "cohort"))
    cases, counted = list(read_manifest(cohort / "cohort.csv")), list[str]()

    def noted(case: Case, own: Config) -> Any:
        counted.append(case.slide_id)
        return tile_case(case, own)

    def tiled(cases: Sequence[Case], name: str = "out") -> pa.Table:
        write_manifest(cohort / "cohort.csv", cases)
        overrides = [f"output={tmp_path / name}", f"cohort.manifest={cohort / 'cohort.csv'}"]
        with open_workspace(load_config(config, overrides)) as workspace:
            tile_cohort(workspace)
            return parquet.read_table(workspace.tiles)

    monkeypatch.setattr("workflows.tile.tile_case", noted)
    first, annotation = cases[0], cases[0].annotation
    outlines = annotation.read_bytes()
    annotation.write_text("[")
    with pytest.raises(AnnotationError):
        tiled(cases[:-1])
    assert sorted(counted) == sorted(case.slide_id for case in cases[:-1])
    counted.clear()
    annotation.write_bytes(outlines)
    table = tiled(cases)
    assert sorted(counted) == sorted([first.slide_id, cases[-1].slide_id])
    assert tiled(cases, "anew").equals(table)


def test_one_scan_is_not_learned_from_and_examined_on(config: Path, tmp_path: Path) -> None:
    manifest = config.parent / "cohort" / "cohort.csv"
    cases = list(read_manifest(manifest))
    twin = replace(cases[0], slide_id="twin", patient="twin", split="test", slide=tmp_path / "twin.tiff")
    shutil.copy(cases[0].slide, twin.slide)
    write_manifest(tmp_path / "cohort.csv", [*cases, twin])
    overrides = [f"output={tmp_path / 'out'}", f"cohort.manifest={tmp_path / 'cohort.csv'}"]
    with open_workspace(load_config(config, overrides)) as workspace, pytest.raises(CohortError, match="twin"):
        tile_cohort(workspace)


def check_tiles(tiles: Path, own: Config, cases: Sequence[Case]) -> None:
    """A row for each cell, counted pixel by pixel, and the sums of every patient; a worker hands them over as numbers."""
    rows, names = list[list[object]](), own.class_list.names
    for case in cases:
        slide, truth = open_slide(case.slide), case_truth(case, own)
        lattice, tissue = slide.base.at(Mpp.square(4)), find_tissue(slide, own.tissue)
        for y, x in product(range(0, lattice.height, 64), range(0, lattice.width, 64)):
            roi = Roi(x, y, 64, 64).intersect(lattice.roi)
            shares = [float((truth.read(roi, lattice) == index).sum() / 64**2) for index in range(len(names))]
            if (share := tissue.fraction(roi, lattice)) >= own.tiles.min_tissue:
                rows.append([case.slide_id, case.patient, case.split, x, y, share, sum(shares), *shares])
    columns = [pa.field(name, pa.string()) for name in ("slide_id", "patient", "split")]
    columns += [pa.field(name, pa.int64()) for name in "xy"]
    columns += [pa.field(name, pa.float64()) for name in ("tissue", "known", *names)]
    table = parquet.read_table(tiles)
    assert table.schema.equals(pa.schema(columns))
    assert [list(row.values()) for row in table.to_pylist()] == rows
    cells = tile_case(cases[0], own).cells
    assert cells.nbytes < 200 * cells.num_rows
    wanted = {case.patient: np.sum([row[7:] for row in rows if row[1] == case.patient], axis=0) for case in cases[1:]}
    found = _content(tiles, cases[1:], own)
    assert found.keys() == wanted.keys() and all((found[patient] == wanted[patient]).all() for patient in wanted)


@pytest.mark.parametrize("start", [0, 800, 1400])
def test_all_labels_are_looked_at_when_tiled(config: Path, tmp_path: Path, start: int) -> None:
    """Those on glass, too, which evaluation will read."""
    image = np.full((800, 1600, 3), 243, np.uint8)
    image[200:600, 200:600] = np.random.default_rng(0).integers((170, 90, 150), (220, 150, 200), (400, 400, 3))
    write_slide(image, tmp_path / "slide.tiff", 1.0)
    labels = np.zeros(image.shape[:2], np.uint8)
    labels[:, start:] = 77
    Image.fromarray(labels).save(tmp_path / "labels.png")
    case = Case("slide", "P", tmp_path / "slide.tiff", tmp_path / "labels.png", "train")
    with pytest.raises(AnnotationError, match="labels of value 77"):
        tile_case(case, load_config(config))
