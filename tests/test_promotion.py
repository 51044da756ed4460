"""Models that are promoted or refused by what they do, runs that are made again, and a model behind a real server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml

from pipeline import __version__
from pipeline.canvas import open_canvas
from pipeline.checkpoint import digest
from pipeline.cohort import read_manifest, write_manifest
from pipeline.config_file import load_config
from pipeline.errors import CheckpointError, CohortError, TrackingError
from pipeline.files import file_digest
from pipeline.lineage import add_models, begin_lineage, models_facts, note_used, read_lineage, write_lineage
from pipeline.metrics import SlideConfusion
from pipeline.origin import packages
from pipeline.phantom import make_cohort
from pipeline.registry import resolve_model
from pipeline.settings import ClusterSettings, EngineSettings
from pipeline.slide import open_slide
from pipeline.slide_job import CANVAS
from pipeline.store import open_store
from pipeline.tally import Tally, paired_means, read_tally
from pipeline.tracking import Run
from pipeline.versions import find_version
from pipeline.workspace import open_workspace
from workflows.evaluate import evaluate
from workflows.promote import promote
from workflows.reproduce import reproduce
from workflows.run import run
from workflows.segment import segment, segment_cohort

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of which six patients are for test, and a configuration that takes seconds, with a store for all runs."""
    folder = tmp_path_factory.mktemp("promotion")
    manifest = make_cohort(folder / "cohort", seed=7, slides=9, width=901, height=703, mpp=1.0)
    content = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    lines = manifest.read_text().splitlines()
    splits = ("train", "train", "val", *["test"] * 6)
    rows = [
        line.rsplit(",", 2)[0] + f",P{number},{split}"
        for number, (line, split) in enumerate(zip(lines[1:], splits, strict=True))
    ]
    manifest.write_text("\n".join([lines[0], *rows]) + "\n")
    content["cohort"], content["cluster"] = {"manifest": str(manifest)}, {"workers": 0}
    content["network"] = {"architecture": "fcn", "mpp": 4.0, "width": 8, "depth": 2}
    content["tiles"]["patch_size"] = 64
    content["training"] = {"epochs": 1, "patches_per_epoch": 4, "batch_size": 4, "warmup_epochs": 0}
    content["segmentation"] = {"tile_size": 128, "splits": ["test"]}
    content["tracking"] = {"uri": f"sqlite:///{folder}/store.db", "experiment": "promotion", "model": "tissue"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, "output": str(folder / "out")}))
    return folder


@pytest.fixture(scope="module")
def store(home: Path) -> "mlflow.MlflowClient":
    return mlflow.MlflowClient(f"sqlite:///{home}/store.db")


@pytest.fixture(scope="module")
def bad(home: Path) -> Path:
    """A run whose network has learned next to nothing."""
    assert run(home / "config.yaml", [f"output={home / 'bad'}", "training.learning_rate=1e-9"]) == 0
    return home / "bad"


@pytest.fixture(scope="module")
def good(home: Path) -> Path:
    """A run whose network tells classes apart."""
    learned = ["training.epochs=2", "training.patches_per_epoch=120", "training.learning_rate=0.01"]
    assert run(home / "config.yaml", [f"output={home / 'good'}", *learned]) == 0
    return home / "good"


def champion(store: "mlflow.MlflowClient") -> str:
    return str(store.get_registered_model("tissue").aliases.get("champion"))


def test_a_better_model_is_taken_and_a_worse_one_refused_with_the_evidence_in_tags(
    home: Path, store: "mlflow.MlflowClient", bad: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse, better = (find_version(str(folder))[1].number for folder in (bad, good))
    output = home / "promotions"
    assert promote(str(bad), "champion", 0.01, None, output) == 0
    assert champion(store) == worse
    assert promote(str(bad), "champion", 0.01, None, output) == 0
    assert "has the alias champion already" in capsys.readouterr().out

    assert promote(str(good), "champion", 0.2, None, output) == 0  # by chance the other may find more of a class
    assert champion(store) == better
    tags = store.get_model_version("tissue", better).tags
    tallies = {number: read_tally(next(output.glob(f"tissue-{number}-*")) / "confusions.json") for number in (worse, better)}
    tested = {case.patient for case in read_manifest(home / "cohort" / "cohort.csv") if case.split == "test"}
    assert set(json.loads(tags["fullfield.champion.patients"])) == tested
    assert all({row.patient for row in tally.rows} == tested for tally in tallies.values())
    before, now = paired_means(tallies[worse], tallies[better])
    differences = [now[patient] - before[patient] for patient in tested]
    assert float(tags["fullfield.champion.difference"]) == pytest.approx(np.mean(differences))
    assert float(tags["fullfield.champion.low"]) < np.mean(differences)
    assert tags["fullfield.champion.against"] == f"models:/tissue/{worse}"

    assert {folder.name for folder in output.iterdir()} == {
        f"tissue-{number}-{digest(run / 'model')[:8]}" for number, run in ((worse, bad), (better, good))
    }
    assert promote(str(bad), "champion", 0.01, None, output) == 3
    assert champion(store) == better
    said = " ".join(capsys.readouterr().out.split())
    assert f"The alias champion stays with models:/tissue/{better}" in said
    assert store.get_model_version("tissue", worse).tags["fullfield.champion.verdict"].startswith("refused")
    tags = store.get_model_version("tissue", worse).tags
    shown = [-found["high"] for found in json.loads(tags["fullfield.champion.classes"]).values()]
    assert promote(str(bad), "champion", max(-float(tags["fullfield.champion.low"]), *shown), None, output) == 0
    assert champion(store) == worse

    store.delete_registered_model_alias("tissue", "champion")
    assert promote(str(bad), "champion", 0.01, None, output) == 0
    kept = {tag for tag in store.get_model_version("tissue", worse).tags if tag.startswith("fullfield.champion.")}
    assert kept == {"fullfield.champion.verdict", "fullfield.champion.when"}  # nothing of the contests before


def test_what_is_invented_costs_the_class_that_it_is_taken_from() -> None:
    healthy = np.array([[900, 0, 0, 0], [0, 100, 0, 0], [0, 0, 0, 0]])
    invented = np.array([[90, 0, 810, 0], [0, 100, 0, 0], [0, 0, 0, 0]])
    for rest in (0, None):
        rows = [SlideConfusion(name, name, "test", counts) for name, counts in (("a", healthy), ("b", invented))]
        tally = Tally(("Other", "Gland", "Tumour"), rest, 1.0, tuple(rows))
        scores, _ = paired_means(tally, tally)
        assert scores["a"] == 1.0
        assert scores["b"] == pytest.approx((2 * 90 / (900 + 90) + 1) / 2)


def test_slides_that_a_model_was_trained_on_do_not_decide(
    home: Path,
    store: "mlflow.MlflowClient",
    bad: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.set_registered_model_alias("tissue", "seen", find_version(str(bad))[1].number)
    cases = read_manifest(home / "cohort" / "cohort.csv")
    swap = {"train": "test", "val": "val", "test": "train"}
    swapped = [replace(case, patient=f"other {case.patient}", split=swap[case.split]) for case in cases]
    write_manifest(tmp_path / "cohort.csv", swapped)
    content = yaml.safe_load((home / "config.yaml").read_text())
    content["cohort"]["manifest"] = str(tmp_path / "cohort.csv")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CohortError, match="no test slide that both models have never seen"):
        promote(str(good), "seen", 0.01, tmp_path / "config.yaml", tmp_path / "out")
    assert capsys.readouterr().out.count("was trained on") == 2
    examined = [replace(case, patient=f"new {case.patient}", split="val") for case in cases if case.split == "test"]
    write_manifest(tmp_path / "cohort.csv", examined)
    assert promote(str(good), "seen", 0.2, tmp_path / "config.yaml", tmp_path / "out") == 0
    tags = store.get_model_version("tissue", find_version(str(good))[1].number).tags
    assert tags["fullfield.seen.split"] == "val"
    assert "flatters" not in tags["fullfield.seen.verdict"]  # they chose nobody's epoch
    assert "patients for validation decide" in capsys.readouterr().out


def test_a_cohort_of_which_nothing_is_known_or_of_other_classes_decides_nothing(
    home: Path, store: "mlflow.MlflowClient", bad: Path, good: Path, tmp_path: Path
) -> None:
    store.set_registered_model_alias("tissue", "silent", find_version(str(bad))[1].number)
    square = {"type": "Polygon", "coordinates": [[[-9, -9], [99999, -9], [99999, 99999], [-9, 99999], [-9, -9]]]}
    outline = {"type": "Feature", "geometry": square, "properties": {"classification": {"name": "Ignore*"}}}
    (tmp_path / "nothing.geojson").write_text(json.dumps(outline))
    cases = [case for case in read_manifest(home / "cohort" / "cohort.csv") if case.split == "test"]
    write_manifest(tmp_path / "cohort.csv", [replace(case, annotation=tmp_path / "nothing.geojson") for case in cases])
    content = yaml.safe_load((home / "config.yaml").read_text())
    content["cohort"]["manifest"] = str(tmp_path / "cohort.csv")
    unknown = {**content, "annotations": {**content["annotations"], "ignored": ["Ignore*"]}}
    (tmp_path / "unknown.yaml").write_text(yaml.safe_dump(unknown))
    with pytest.raises(CohortError, match="nothing known of the slides to examine"):
        promote(str(good), "silent", 0.01, tmp_path / "unknown.yaml", tmp_path / "unknown")
    content["classes"].reverse()
    (tmp_path / "reversed.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CheckpointError, match="List the model's classes"):
        promote(str(good), "silent", 0.01, tmp_path / "reversed.yaml", tmp_path / "out")


def test_a_version_is_found_by_all_that_means_it(
    home: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/store.db")
    run_id = json.loads((good / "run.json").read_text())["run_id"]
    number = find_version(str(good))[1].number
    for reference in (str(good / "model"), f"runs:/{run_id}", f"models:/tissue/{number}"):
        assert find_version(reference)[1].number == number
    with pytest.raises(TrackingError, match=r"run\.json: found no such file; expected the output folder of a run"):
        find_version(str(tmp_path))
    open_store(f"sqlite:///{tmp_path}/other.db", create=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    place, version = find_version(str(good))
    assert (place.address, version.number) == (f"sqlite:///{home}/store.db", number)  # where the folder says that it is


@pytest.mark.parametrize(("alias", "said"), [("my alias", "letters, digits, _ and -"), ("latest", "keeps to itself")])
def test_an_alias_that_mlflow_does_not_take_is_refused(good: Path, tmp_path: Path, alias: str, said: str) -> None:
    with pytest.raises(TrackingError, match=said):
        promote(str(good), alias, 0.01, None, tmp_path)


def test_a_run_tells_what_it_is_made_of_and_is_made_again(
    home: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_lineage(good / "lineage.json")
    (model,) = found["models"]
    assert model["ancestry"]["training"]["epochs"] in (1, 2) and model["ancestry"]["training"]["minutes"] > 0
    assert found["origins"][0]["packages"]["torch"] == packages()["torch"] and found["seed"] == 0
    assert found["training"]["epochs"] == 2 and found["training"]["minutes"] >= model["ancestry"]["training"]["minutes"]
    cases = {case.slide_id: case for case in read_manifest(good / "cohort.csv")}
    assert {slide["slide_id"]: slide["split"] for slide in found["slides"]} == {name: cases[name].split for name in cases}
    for slide in found["slides"]:
        assert slide["slide_digest"] == open_slide(cases[slide["slide_id"]].slide).digest()
    assert {slide["split"] for slide in model["ancestry"]["slides"]} == {"train", "val"}

    again = tmp_path / "again"
    assert reproduce(str(good), again) == 0
    told, way = capsys.readouterr().out, model["ancestry"]["training"]
    assert "Nothing has changed since" in told and f"trained on {way['device']} in {way['format']}: another" in told
    old, new = load_config(good / "config.yaml"), load_config(again / "config.yaml")
    assert new.output == again and new.training == old.training and new.network == old.network
    assert new.tracking == old.tracking.model_copy(update={"alias": "again"}) and old.tracking.alias == "newest"
    splits = [(case.slide_id, case.patient, case.split) for case in read_manifest(again / "cohort.csv")]
    assert splits == [(case.slide_id, case.patient, case.split) for case in cases.values()]

    run_id = json.loads((good / "run.json").read_text())["run_id"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/store.db")
    changed = [case for case in cases.values() if case.split == "test"]
    shutil.copy(changed[0].slide, tmp_path / "kept.tiff")
    text = (annotation := changed[1].annotation).read_text()
    try:
        changed[0].slide.unlink()
        annotation.write_text(text + "\n")
        assert reproduce(f"runs:/{run_id}", tmp_path / "more") == 0
    finally:
        shutil.copy(tmp_path / "kept.tiff", changed[0].slide)
        annotation.write_text(text)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")]
    assert len(said) == 2 and f"slide of {changed[0].slide_id}" in said[0] and said[0].endswith("cannot be read")
    assert f"annotation of {changed[1].slide_id}" in said[1]
    check_evaluation_is_told(good, annotation)


def test_a_run_is_made_again_into_no_folder_of_something_else(good: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    for _ in range(2):  # the second time into its own folder, which is as it was
        assert reproduce(str(good), again) == 0
    (again / "cohort.csv").write_text((again / "cohort.csv").read_text().replace(",train,", ",val,"))
    with pytest.raises(CohortError, match=r"cohort.csv: found another cohort than the one to be .* \(--output of"):
        reproduce(str(good), again)
    with pytest.raises(CheckpointError, match="another folder"):
        reproduce(str(good), good)
    for name in ("folds.csv", "sweep.csv", "training.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=name):
            reproduce(str(good), tmp_path)
        (tmp_path / name).unlink()


def check_evaluation_is_told(good: Path, annotation: Path) -> None:
    """Whoever corrects a truth and evaluates once more finds the digest of that which the figures rest on."""
    text = annotation.read_text()
    try:
        annotation.write_text(text + " ")
        told = file_digest(annotation)
        assert evaluate(good / "config.yaml", []) == 0
    finally:
        annotation.write_text(text)
    (slide,) = (one for one in read_lineage(good / "lineage.json")["slides"] if one["annotation"] == str(annotation))
    assert slide["annotation_digest"] == told != file_digest(annotation)
    note_used(good, [{**slide, "slide_digest": "another scan's"}])
    with open_workspace(load_config(good / "config.yaml")) as workspace:
        assert segment_cohort(workspace) == 0  # which skips it: it is the one that was segmented
        told = read_lineage(Path(workspace.run.store.client.download_artifacts(workspace.run.run_id, "lineage.json")))
    assert {**slide, "annotation_digest": file_digest(annotation)} in told["slides"]
    assert evaluate(good / "config.yaml", []) == 0


def test_a_server_answers_as_segment_does(home: Path, good: Path, tmp_path: Path) -> None:
    slide = read_manifest(good / "cohort.csv")[-1].slide
    here = ClusterSettings(workers=0)
    assert segment([slide], [str(good / "model")], tmp_path, None, None, here, EngineSettings()) == 0
    lineages = [json.loads((folder / "lineage.json").read_text()) for folder in (tmp_path, good)]
    assert lineages[0]["segmented_with"][0]["ancestry"] == lineages[1]["models"][0]["ancestry"]
    canvas = open_canvas(tmp_path / "slides" / slide.stem / CANVAS)
    pixels = open_slide(slide).read(canvas.lattice.roi, canvas.lattice)
    expected = canvas.read_probabilities(canvas.lattice.roi)
    examined = canvas.read_labels(canvas.lattice.roi) != 255
    store, version = find_version(str(good))
    stored = resolve_model(version.reference, store.address).parents[1]
    with _mlflow(["models", "serve", "--model-uri", str(stored), "--env-manager", "local"], "ping", tmp_path) as address:
        with _asked(address, pixels) as answer:
            served = np.array(json.load(answer)["predictions"])[0]
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            _asked(address, pixels / 256)
        assert "RGB from 0 to 255 is expected" in refused.value.read().decode()
    assert examined.any()
    assert np.abs(served - expected / 255)[:, examined].max() <= 0.5 / 255 + 1e-5


def _asked(address: str, pixels: np.ndarray) -> Any:
    """What a server answers to one patch."""
    body = json.dumps({"inputs": pixels[None].tolist()}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def test_a_model_of_a_tracking_server_is_kept_where_workers_find_it(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    places = ["--backend-store-uri", f"sqlite:///{tmp_path}/store.db", "--artifacts-destination", str(tmp_path / "files")]
    with _mlflow(["server", "--workers", "1", *places], "health", tmp_path) as address:
        started = Run.start(tmp_path / "run", "served", "run", address)
        reference = started.log_model(good / "model", ["Other", "Gland", "Fat"], "kept", "newest")
        found = [resolve_model(reference, address) for _ in range(2)]
    assert found[0] == found[1] and found[0].is_relative_to(tmp_path / "cache")
    assert digest(found[0]) == digest(good / "model")
    assert len(list(found[0].parent.iterdir())) == 1


def test_what_began_a_lineage_stays_in_it(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a run that skips everything, nor slides segmented into its folder, hide that other code began it."""
    kept, config = (good / "lineage.json").read_text(), (good / "config.yaml").read_text()
    found = json.loads(kept)
    found["origins"][0] |= {"version": "0.0.9", "packages": {**found["origins"][0]["packages"], "torch": "1.0"}}
    (good / "lineage.json").write_text(json.dumps(found))
    try:
        assert run(good / "config.yaml", []) == 0
        slide = read_manifest(good / "cohort.csv")[-1].slide
        assert segment([slide], [str(good / "model")], good, None, None, ClusterSettings(workers=0), EngineSettings()) == 0
        capsys.readouterr()
        assert reproduce(str(good), tmp_path / "again") == 0
        assert len(json.loads((good / "lineage.json").read_text())["origins"]) == 2
        said = capsys.readouterr().out.splitlines()
        (good / "config.yaml").write_text(config.replace("seed: 0", "seed: 7"))
        assert reproduce(str(good), tmp_path / "other") == 0
    finally:
        (good / "lineage.json").write_text(kept)
        (good / "config.yaml").write_text(config)
    changed = [line.split(",")[0] for line in said if line.startswith("changed: ")]
    assert changed == ["changed: version: was 0.0.9", "changed: package torch: was 1.0"]
    assert [line.split()[6] for line in said if line.startswith("gone on with: ")] == [__version__]
    assert "changed: config.yaml: a later command" in capsys.readouterr().out


@contextmanager
def _mlflow(arguments: list[str], page: str, folder: Path) -> Iterator[str]:
    """The address of a server of MLflow's, which answers at `page`; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/{page}", server, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def test_a_lineage_names_all_models_that_segmented_into_a_folder(good: Path, bad: Path, tmp_path: Path) -> None:
    for model in (good, bad, good):
        add_models(tmp_path, models_facts([model / "model"]))
    found = json.loads((tmp_path / "lineage.json").read_text())
    assert {one["path"] for one in found["segmented_with"]} == {str(run / "model") for run in (good, bad)}
    assert len(found["origins"]) == 1


def test_a_lineage_begins_with_who_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with who ends the training, nor with who made a model that is gone."""
    for code in ("A", "B", "C"):
        monkeypatch.setattr("pipeline.lineage.origin", lambda code=code: {"code": code, "version": "1", "machine": "m"})
        if code == "A":
            begin_lineage(tmp_path, anew=True)
        elif code == "B":  # goes on with the training, and ends it
            begin_lineage(tmp_path, anew=False)
            write_lineage(tmp_path, {"models": [], "slides": []})
            assert [one["code"] for one in read_lineage(tmp_path / "lineage.json")["origins"]] == ["A", "B"]
            monkeypatch.setattr("pipeline.lineage.origin", lambda: {"code": "A", "version": "1", "machine": "m"})
            begin_lineage(tmp_path, anew=False)  # whoever comes back is there
        else:  # the model was deleted
            begin_lineage(tmp_path, anew=True)
    found = json.loads((tmp_path / "lineage.json").read_text())
    assert [one["code"] for one in found["origins"]] == ["C"] and "models" not in found
    assert [one["code"] for one in read_lineage(tmp_path / "lineage.json.old")["origins"]] == ["A", "B"]


def test_packages_are_those_that_python_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("numpy-0.0.1", "Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n"), ("rest-1", "")):
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.__wrapped__()["numpy"] == "0.0.1"


def test_a_run_that_skips_everything_leaves_the_record_of_what_it_took(
    good: Path, store: "mlflow.MlflowClient", tmp_path: Path
) -> None:
    assert run(good / "config.yaml", []) == 0
    whole = json.loads((good / "run.json").read_text())
    below = store.search_runs([whole["experiment_id"]], f"tags.`mlflow.parentRunId` = '{whole['run_id']}'")
    (found,) = (one for one in below if one.info.run_name == "segment")
    assert found.data.metrics["megapixels"] > 0 and found.data.metrics["failed"] == 0
    kept = Path(store.download_artifacts(found.info.run_id, "slides.csv", str(tmp_path)))
    assert kept.read_text() == (good / "slides.csv").read_text()
