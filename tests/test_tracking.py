"""Runs and models in real SQLite stores, looked at through MLflow's own client."""

import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from pipeline import __version__
from pipeline.epoch_log import EpochLog
from pipeline.errors import CheckpointError, TrackingError
from pipeline.registry import _require_there, resolve_model
from pipeline.snapshot import Record
from pipeline.store import Store, open_store
from pipeline.tracking import Run
from pipeline.versions import find_version


@pytest.fixture(autouse=True)
def _no_store_from_outside(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    """One SQLite store for all runs of this file: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store') / 'mlflow.db'}"


@pytest.fixture
def start(shared_store, tmp_path):
    """Starts, or continues, this test's run."""
    return lambda output="out": Run.start(tmp_path / output, "tests", "a run", shared_store)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny network with random weights, its halo and stride measured."""
    torch = pytest.importorskip("torch")
    from pipeline.architectures import build_network
    from pipeline.checkpoint import save
    from pipeline.classes import Class, Classes
    from pipeline.network import ModelSpec

    torch.manual_seed(5)
    classes = Classes((Class("rest", (0, 0, 0)), Class("gland", (255, 0, 0))))
    spec = ModelSpec(architecture="fcn", classes=classes, mpp=1.0, patch_size=32, width=4, depth=2, stride=4, halo=16)
    folder = tmp_path_factory.mktemp("trained") / "my model"
    save(folder, spec, build_network(spec))
    return folder


def look(run):
    return run.store.client.get_run(run.run_id)


def read_file(run, name):
    return Path(run.store.client.download_artifacts(run.run_id, name)).read_text()


def history(run, key):
    return [(metric.step, metric.value) for metric in run.store.client.get_metric_history(run.run_id, key)]


SCRIPT = """
import sys
from pathlib import Path
import pipeline.tracking
assert "mlflow" not in sys.modules, "importing the module imported MLflow"
output, model = Path(sys.argv[1]), Path(sys.argv[2])
with pipeline.tracking.Run.start(output, "fullfield", "demo") as run, run.child("train") as stage:
    stage.log_metrics({"loss": 0.5})
    stage.log_model(model, ["rest", "gland"], "fullfield", "newest")
import mlflow
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
assert "torch" not in sys.modules, "the client needs no torch"
print(run.run_id)
"""


def test_the_default_store_lies_in_the_output_and_says_nothing(trained, tmp_path):
    output, elsewhere = tmp_path / "run s", tmp_path / "cwd"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT, str(output), str(trained)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    names = sorted(item.name for item in output.iterdir())
    assert names == [".mlflow.db.lock", "mlartifacts", "mlflow.db", "run.json"]
    assert list(elsewhere.iterdir()) == []
    record = json.loads((output / "run.json").read_text())
    assert record["run_id"] == done.stdout.strip()  # nothing else was printed

    run = Run.start(output, "fullfield", "demo")
    assert run.run_id == record["run_id"]
    assert look(run).info.artifact_uri.startswith((output / "mlartifacts").as_uri())
    assert resolve_model("models:/fullfield@newest", f"sqlite:///{output / 'mlflow.db'}").is_relative_to(output)
    moved_output_begins_anew(run, output, tmp_path / "copy")


def moved_output_begins_anew(run, output, copy):
    shutil.copytree(output, copy)
    before = sorted(output.rglob("*"))
    moved = Run.start(copy, "fullfield", "demo")
    assert moved.run_id != run.run_id
    with moved:
        moved.log_text("note.txt", "here")
    assert list(copy.glob("mlartifacts/*/artifacts/note.txt"))
    assert sorted(output.rglob("*")) == before  # nothing went to the place that it was copied from
    assert Run.start(copy, "fullfield", "demo").run_id == moved.run_id


def test_a_store_whose_making_was_killed_is_made_anew(tmp_path):
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = (
        "import os, pathlib, sys; from pipeline.store import open_store;"
        "pathlib.Path.replace = lambda *names: os.kill(os.getpid(), 9);"  # it has all its tables, and no name yet
        "open_store(sys.argv[1], create=True)"
    )
    assert subprocess.run([sys.executable, "-c", code, address]).returncode == -signal.SIGKILL
    assert (tmp_path / "mlflow.db").read_bytes() == b"" and list(tmp_path.glob("mlflow.db.*.partial"))
    assert open_store(address, create=True).client.search_experiments()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_a_store_whose_making_fails_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(TrackingError, match="found 'disk I/O error'; expected a place to read and write"):
            open_store(f"sqlite:///{tmp_path / 'mlflow.db'}", create=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]
    assert (tmp_path / "mlflow.db").read_bytes() == b""


def test_a_store_that_does_not_open_says_why(tmp_path, monkeypatch):
    connect, path = sqlite3.connect, tmp_path / "mlflow.db"
    monkeypatch.setattr("sqlite3.connect", lambda path: connect(path, timeout=0.1))
    with closing(connect(path)) as other:
        other.execute("CREATE TABLE runs (id INTEGER)")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingError, match=f"{path}: found a database that is locked; .* wait for that"):
            open_store(f"sqlite:///{path}", create=True)
    path.write_text("no database, but a text of some length" * 99)
    (tmp_path / "folder.db").mkdir()
    told = {path: "found file is not a database", tmp_path / "folder.db": "found a folder"}
    for place, found in told.items():
        with pytest.raises(TrackingError, match=f"{place}: {found}; .* Move it away, or choose another store"):
            open_store(f"sqlite:///{place}", create=True)
    with pytest.raises(TrackingError, match="unable to open database file'; .* give access"):
        open_store("sqlite:////proc/mlflow.db", create=True)


def test_a_stage_stands_for_its_run_where_a_file_is_looked_up(start, tmp_path):
    with start() as run, run.child("train") as stage:
        run.log_text("lineage.json", "{}")
    assert run.store.fetch(stage.run_id, "lineage.json", tmp_path, "a run").read_text() == "{}"


def test_running_again_continues_the_run_and_its_stages(start):
    with start() as run, run.child("tile") as tile, run.child("train") as train:
        assert look(run).info.status == look(train).info.status == "RUNNING"
        train.log_metrics({"loss": 1.0}, step=0)
    assert look(run).info.status == look(tile).info.status == "FINISHED"
    with start() as again, again.child("train") as train_again:
        train_again.log_metrics({"loss": 0.5}, step=1)
        assert look(again).info.status == "RUNNING"
    assert (again.run_id, train_again.run_id) == (run.run_id, train.run_id)
    assert look(again).info.status == "FINISHED"
    assert history(train, "loss") == [(0, 1.0), (1, 0.5)]
    nested = run.store.client.search_runs([run.experiment_id], f"tags.`mlflow.parentRunId` = '{run.run_id}'")
    assert sorted(child.info.run_name for child in nested) == ["tile", "train"]
    assert start("another").run_id != run.run_id


def test_figures_of_two_attempts_are_not_mixed(start):
    run = start()
    first = run.child("train")  # RUNNING, as a killed process leaves it
    assert run.child("train", anew=True).run_id == first.run_id  # there is nothing to mix
    first.log_metrics({"loss": 1.0}, step=1)
    assert run.child("train").run_id == first.run_id
    second = run.child("train", anew=True)
    assert second.run_id != first.run_id
    assert (look(first).info.status, look(first).data.tags["fullfield.stage"]) == ("KILLED", "earlier train")
    second.log_metrics({"loss": 0.5}, step=1)
    second.log_metrics({"loss": 0.4}, step=2)
    assert run.child("train").run_id == second.run_id
    assert (first.steps("loss"), second.steps("loss"), second.steps("dice")) == ({1}, {1, 2}, set())
    assert history(first, "loss") == [(1, 1.0)]


def test_a_run_that_is_gone_is_begun_anew(start, tmp_path, capsys):
    first = start()
    first.store.client.delete_run(first.run_id)
    second = start()
    assert second.run_id != first.run_id
    record = tmp_path / "out" / "run.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "run_id": "0" * 32}))
    third = start()
    record.write_text(json.dumps({**content, "store": "http://elsewhere"}))
    fourth = start()
    record.write_text(record.read_text()[:20])
    capsys.readouterr()
    fifth = start()
    assert f"{record} is damaged, so that another MLflow run is begun" in capsys.readouterr().out
    assert len({run.run_id for run in (first, second, third, fourth, fifth)}) == 5
    assert start().run_id == fifth.run_id
    assert not list(record.parent.glob("*.partial"))


def test_how_a_run_ended_is_told(start):
    with pytest.raises(ValueError, match="no gland"), start() as run:
        raise ValueError("no gland at http://me:secret@host/x")
    found = look(run)
    assert found.info.status == "FAILED"
    assert found.data.tags["fullfield.error"] == "ValueError: no gland at http://***@host/x"
    with pytest.raises(KeyboardInterrupt), start() as run:
        raise KeyboardInterrupt
    assert look(run).info.status == "KILLED"
    with start() as run:
        pass
    assert look(run).info.status == "FINISHED"
    assert "fullfield.error" not in look(run).data.tags


def test_a_dying_store_does_not_hide_the_error_of_the_run(start):
    with pytest.raises(ValueError, match="mine") as caught, start() as run:
        run.store.client.delete_run(run.run_id)
        raise ValueError("mine")
    assert "could not be marked as FAILED" in caught.value.__notes__[0]


def test_a_server_that_is_away_for_a_while_ends_no_training(start, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from mlflow import MlflowClient

    now = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr("pipeline.epoch_log.time", now)
    records = [Record(epoch, {"loss": 1 / epoch}, best=True, planned=4) for epoch in range(1, 6)]
    run = start()
    fold, there, away = Path("fold"), run.store, Store("http://127.0.0.1:9", MlflowClient("http://127.0.0.1:9"))
    log = EpochLog({fold: run})
    assert log.add(fold, records[0]) and not log.add(fold, records[0])
    run.store = away
    for record in records[1:3]:
        assert log.add(fold, record)
    with pytest.raises(TrackingError, match="refused"):
        log.finish()
    run.store = there
    assert log.add(fold, records[3])
    assert history(run, "loss") == [(1, 1.0)]  # it is not asked again at once, which takes minutes
    now.monotonic = lambda: 2000.0
    assert log.add(fold, records[4])
    log.finish()
    assert history(run, "loss") == [(epoch, 1 / epoch) for epoch in range(1, 6)]
    assert capsys.readouterr().out.count("figures are logged later") == 1
    assert not any(EpochLog({fold: run}).add(fold, record) for record in records)


@pytest.mark.parametrize(
    ("limit", "free", "found"),
    [
        ("max_page_count=1", f"max_page_count={2**30}", "disk is full"),
        ("query_only=1", "query_only=0", "readonly database"),
    ],
)
def test_a_disk_that_refuses_is_told_in_a_line(start, capfd, monkeypatch, limit, free, found):
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    def refuse(connection, *_):
        connection.execute(f"PRAGMA {limit}")

    def allow(connection, *_):
        connection.execute(f"PRAGMA {free}")

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    hooks, tags = {"checkout": refuse, "checkin": allow}, {f"note {index}": 5000 * "x" for index in range(50)}
    try:
        with pytest.raises(TrackingError) as caught, start() as run:
            for name, hook in hooks.items():
                event.listen(Pool, name, hook)
            time.sleep(0.5)  # the machine's load is to be recorded meanwhile
            run.set_tags(tags)
    finally:
        for name, hook in hooks.items():
            event.remove(Pool, name, hook)
    expected = f"{run.store.shown}: found {found!r}; expected a place to read and write. Make room or give access."
    assert str(caught.value) == expected
    assert capfd.readouterr().err == ""


def test_a_run_says_where_it_comes_from(start):
    tags = look(start()).data.tags
    assert tags["fullfield.version"] == __version__
    assert tags["mlflow.source.type"] == "LOCAL"
    package = Path(__file__).parents[1] / "pipeline"
    git = ["git", "-C", str(package)]
    tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "tracking.py"], capture_output=True).returncode == 0
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = head.stdout.strip() if tracked and head.returncode == 0 else None
    assert tags.get("mlflow.source.git.commit") == expected


def test_several_runs_are_open_at_once_and_mlflow_stays_as_it_was(start):
    import mlflow

    uri = mlflow.get_tracking_uri()
    with start("one") as one, start("two") as two, one.child("train") as train, two.child("train") as other:
        train.log_metrics({"loss": 1.0})
        other.log_metrics({"loss": 2.0})
        assert mlflow.active_run() is None
    assert (history(train, "loss"), history(other, "loss")) == ([(0, 1.0)], [(0, 2.0)])
    assert mlflow.get_tracking_uri() == uri
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_parameters_are_flat_and_a_changed_one_is_told(start):
    nested = {"training": {"sizes": [8, 16], "resume": None, "exact": True}, "Region*": "x" * 7000}
    run = start()
    run.log_params(nested)
    run.log_params({f"many.{i}": i for i in range(250)})
    params = look(run).data.params
    assert params["training.sizes"] == "[8, 16]"
    assert (params["training.resume"], params["training.exact"]) == ("null", "true")
    assert next(value for name, value in params.items() if name.startswith("Region_-")) == "x" * 6000
    assert params["many.249"] == "249"
    run.log_params(nested)
    assert not [tag for tag in look(run).data.tags if tag.startswith("changed.")]
    run.log_params({**nested, "training": {"sizes": [4]}})
    assert look(run).data.params["training.sizes"] == "[8, 16]"
    assert look(run).data.tags["changed.training.sizes"] == "[4]"
    run.log_params(nested)
    assert "changed.training.sizes" not in look(run).data.tags


def test_metrics_keep_their_steps_under_names_that_mlflow_allows(start):
    run = start()
    for step in range(3):
        run.log_metrics({"dice Region*": step / 4, "absent": None, "N/A": 1, "../up": 2, "Drüse": 3}, step)
    names = {name.partition("-")[0]: name for name in look(run).data.metrics}
    assert history(run, names["dice Region_"]) == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert set(names) == {"dice Region_", "N/A", "___up", "Drüse"}
    run.log_metrics({"Drüse": None}, 3)
    assert np.isnan(look(run).data.metrics["Drüse"])
    run.log_metrics({f"m{i}": np.float32(i) for i in range(1200)})
    assert len(look(run).data.metrics) == 1204


def test_names_that_mlflow_cannot_tell_apart_are_told_apart(start):
    run, long = start(), 300 * "x"
    run.log_metrics({"<1%": 1, ">1%": 2, f"{long}1": 3, f"{long}2": 4})
    assert sorted(look(run).data.metrics.values()) == [1, 2, 3, 4]
    run.log_metrics({">1%": 5}, 1)
    assert sorted(look(run).data.metrics.values()) == [1, 3, 4, 5]
    assert max(map(len, look(run).data.metrics)) == 250


def test_files_tables_and_references_are_found_in_the_run(start, tmp_path):
    run = start()
    run.log_config("tracking:\n  uri: https://me:secret@host/x\n", "d" * 64)
    assert read_file(run, "config.yaml") == "tracking:\n  uri: https://***@host/x\n"
    assert look(run).data.tags["config.digest"] == "d" * 64
    picture = tmp_path / "über 100%.png"
    for content in ("old", "new"):
        picture.write_text(content)
        run.log_file(picture, "slides/über 1")
    assert read_file(run, f"slides/über 1/{picture.name}") == "new"
    canvas = tmp_path / "canvas.zarr"
    (canvas / "c" / "0").mkdir(parents=True)
    (canvas / "c" / "0" / "0").write_bytes(bytes(300))
    (canvas / "zarr.json").write_bytes(bytes(20))
    run.log_reference("canvas 1", canvas)
    assert json.loads(read_file(run, "references/canvas 1.json")) == {"uri": canvas.as_uri(), "bytes": 320, "files": 2}
    with pytest.raises(TrackingError, match="nowhere.png"):
        run.log_file(tmp_path / "nowhere.png")


def test_names_that_would_end_an_address_are_written_otherwise(start, tmp_path):
    (tmp_path / "overlay.png").write_bytes(b"png")
    with start() as run:
        for name in ("S12 #1", "S12 #2"):
            run.log_file(tmp_path / "overlay.png", f"slides/{name}")
    listed = [item.path for item in run.store.client.list_artifacts(run.run_id, "slides")]
    assert listed == ["slides/S12 _1", "slides/S12 _2"]


def test_numbers_and_notes_of_what_is_gone_do_not_stay(start):
    run = start()
    run.log_metrics({"val dice <a>": 0.5, "test dice <a>": 0.25, "loss": 2})
    run.renew_metrics({"val dice <a>": 0.75, "val slides": 3}, ["val", "test"])
    found = [value for value in look(run).data.metrics.values() if value == value]  # but for NaN
    assert sorted(found) == [0.75, 2, 3] and len(look(run).data.metrics) == 4
    run.note_names("fullfield.left_out", ["a", "b"])
    assert look(run).data.tags["fullfield.left_out"] == "a, b"
    for _ in range(2):
        run.note("fullfield.left_out", "")
        assert "fullfield.left_out" not in look(run).data.tags


def test_a_list_that_is_too_long_for_a_tag_is_a_file(start):
    run, names = start(), [f"slide {number:03}, {'x' * 30}" for number in range(300)]
    run.note_names("fullfield.left_out", names)
    tag = look(run).data.tags["fullfield.left_out"]
    assert tag.startswith(f"300, all of them in fullfield.left_out.txt: {names[0]}, {names[1]}, ") and len(tag) < 8000
    assert read_file(run, "fullfield.left_out.txt").splitlines() == names
    for fewer in (names[:2], []):
        run.note_names("fullfield.left_out", fewer)
        assert look(run).data.tags.get("fullfield.left_out", "") == ", ".join(fewer)
        assert read_file(run, "fullfield.left_out.txt").splitlines() == fewer


def test_a_data_set_is_noted_once(start, tmp_path):
    run = start()
    for _ in range(2):
        run.log_dataset("slide 1", "c" * 64, tmp_path / "s.svs", "training")
    (used,) = look(run).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("slide 1", "c" * 36)
    assert json.loads(used.dataset.source) == {"uri": (tmp_path / "s.svs").as_uri()}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]


def test_the_load_of_the_machine_is_recorded_and_continued(start, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    for _ in range(2):
        with start() as run:
            time.sleep(1)
    steps = [step for step, _ in history(run, "system/cpu_utilization_percentage")]
    assert len(steps) >= 2
    assert steps == sorted(set(steps))


def test_a_model_is_stored_as_code_and_weights_and_found_by_every_name(start, trained, shared_store, tmp_path):
    run = start()
    stage = run.child("train")
    assert stage.log_model(trained, ["rest", "gland"], "tiny", "newest") == "models:/tiny/1"
    assert stage.log_model(trained, ["rest", "gland"], "tiny", "newest") == "models:/tiny/1"  # it is there already
    names = ["models:/tiny@newest", "models:/tiny/1", f"runs:/{stage.run_id}", f"runs:/{stage.run_id}/model"]
    (place,) = {resolve_model(name, shared_store) for name in [*names, f"runs:/{run.run_id}"]}
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        path.name: path.read_bytes() for path in trained.iterdir()
    }
    model = place.parents[1]
    assert resolve_model(str(model)) == place
    assert resolve_model(str(trained)) == trained
    with pytest.raises(TrackingError, match=r"models:/fullfield/1: found a model that lay in .*, which is gone.*Move"):
        _require_there("models:/fullfield/1", (tmp_path / "gone").as_uri())
    endings = {path.suffix for path in model.rglob("*") if path.is_file()}
    assert endings <= {"", ".py", ".typed", ".yaml", ".json", ".txt", ".safetensors"}
    assert f"torch=={sys.modules['torch'].__version__.partition('+')[0]}" in (model / "requirements.txt").read_text()

    changed = shutil.copytree(trained, tmp_path / "changed")
    (changed / "model.yaml").write_text((trained / "model.yaml").read_text() + "# retrained\n")
    assert stage.log_model(changed, ["rest", "gland"], "tiny", "newest") == "models:/tiny/2"
    assert resolve_model("models:/tiny@newest", shared_store) != place
    assert resolve_model("models:/tiny/1", shared_store) == place
    run.log_file(trained, "best")
    plain = resolve_model(f"runs:/{run.run_id}/best/{trained.name}", shared_store)
    assert (plain / "weights.safetensors").read_bytes() == (trained / "weights.safetensors").read_bytes()


def test_an_older_run_called_again_leaves_the_alias_with_the_newer_model(start, trained, shared_store, tmp_path):
    run = start()
    older, newer = run.child("first"), run.child("second")
    changed = shutil.copytree(trained, tmp_path / "changed")
    (changed / "model.yaml").write_text((trained / "model.yaml").read_text() + "# another\n")
    assert older.log_model(trained, ["rest", "gland"], "shared", "newest") == "models:/shared/1"
    assert newer.log_model(changed, ["rest", "gland"], "shared", "newest") == "models:/shared/2"
    assert older.log_model(trained, ["rest", "gland"], "shared", "newest") == "models:/shared/1"
    found = resolve_model("models:/shared@newest", shared_store)
    assert found == resolve_model("models:/shared/2", shared_store)
    assert older.log_model(trained, ["rest", "gland"], "shared", "other") == "models:/shared/1"
    assert resolve_model("models:/shared@other", shared_store) == resolve_model("models:/shared/1", shared_store)
    assert older.log_model(changed, ["rest", "gland"], "shared", "other") == "models:/shared/3"
    assert older.log_model(trained, ["rest", "gland"], "shared", "other") == "models:/shared/1"  # it is put back
    assert resolve_model("models:/shared@other", shared_store) == resolve_model("models:/shared/1", shared_store)


def test_a_model_is_served_in_as_many_views_as_its_run_had(start, trained, shared_store, tmp_path):
    import mlflow
    import yaml

    from pipeline.runtime import load_engine
    from pipeline.settings import EngineSettings

    model = shutil.copytree(trained, tmp_path / "flipped")
    content = yaml.safe_load((model / "model.yaml").read_text())
    (model / "model.yaml").write_text(yaml.safe_dump({**content, "lineage": {**content.get("lineage", {}), "flips": True}}))
    start().log_model(model, ["rest", "gland"], "flipped", "newest")
    served = mlflow.pyfunc.load_model(str(resolve_model("models:/flipped@newest", shared_store).parents[1]))
    patches = np.random.default_rng(0).integers(0, 256, (2, 24, 36, 3), np.uint8)
    expected = load_engine(model, EngineSettings(flips=True))(patches)
    np.testing.assert_allclose(served.predict(patches), expected, atol=1e-6)
    assert np.abs(expected - load_engine(model)(patches)).max() > 1e-3


def test_a_stored_model_names_all_that_it_is_served_with(start, trained, shared_store):
    """No package counts but those of its own requirements, and what these require."""
    start().log_model(trained, ["rest", "gland"], "alone", "newest")
    folder = resolve_model("models:/alone@newest", shared_store).parents[1]
    code = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from packaging.requirements import Requirement

def spelled(name):
    return re.sub("[-_.]+", "-", name).lower()

wanted, found = [Requirement(line).name for line in Path(sys.argv[1], "requirements.txt").read_text().splitlines()], set()
while wanted:
    name = spelled(wanted.pop())
    if name not in found:
        found.add(name)
        try:
            needs = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # of another platform
            continue
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
own = {"fullfield", "setuptools", "pip"}  # the code is in the model's folder
absent = {top for top, owners in packages_distributions().items() if not {*map(spelled, owners)} & (found | own)}

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import mlflow, numpy
assert "openvino" in absent
print(mlflow.pyfunc.load_model(sys.argv[1]).predict(numpy.full((1, 32, 32, 3), 255, numpy.uint8)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["(1, 2, 32, 32)"], done.stderr


def test_a_served_model_with_a_normalisation_is_told_how_the_slide_is_stained(start, trained, shared_store, tmp_path):
    import mlflow

    from pipeline import checkpoint
    from pipeline.runtime import load_engine
    from pipeline.staining import Normalisation, Staining
    from pipeline.stains import restained

    spec, network = checkpoint.load(trained)
    wanted = Normalisation("reinhard", ((0.4, 0.0, 0.0), (0.0, 0.6, 0.0), (0.0, 0.0, 0.5)))
    checkpoint.save(tmp_path / "model", replace(spec, normalisation=wanted), network)
    start().log_model(tmp_path / "model", ["rest", "gland"], "stained", "newest")
    served = mlflow.pyfunc.load_model(str(resolve_model("models:/stained@newest", shared_store).parents[1]))
    patches = np.random.default_rng(0).integers(0, 256, (2, 24, 36, 3), np.uint8)
    found = Staining((240.0, 238.0, 243.0), ((0.6, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.3)))
    expected = load_engine(trained)(np.stack([restained(patch, found, wanted) for patch in patches]))
    answer = served.predict(patches, params={"staining": json.dumps(found.to_dict())})
    np.testing.assert_allclose(answer, expected, atol=1e-6)
    for text in ("nonsense", "{}", "3"):
        with pytest.raises(mlflow.exceptions.MlflowException, match="the parameter `staining`: expected the JSON text"):
            served.predict(patches, params={"staining": text})
    with pytest.warns(UserWarning, match="not normalised"):
        np.testing.assert_allclose(served.predict(patches), load_engine(trained)(patches), atol=1e-6)


def test_the_served_model_answers_as_the_engine_does(start, trained, shared_store):
    import mlflow

    from pipeline.runtime import load_engine

    start().log_model(trained, ["rest", "gland"], "served", "newest")
    folder = resolve_model("models:/served@newest", shared_store).parents[1]
    served = mlflow.pyfunc.load_model(str(folder))
    patches = np.random.default_rng(0).integers(0, 256, (3, 24, 36, 3), np.uint8)
    probabilities = served.predict(patches)
    assert (probabilities.shape, probabilities.dtype) == ((3, 2, 24, 36), np.float32)
    np.testing.assert_allclose(probabilities, load_engine(trained)(patches), atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)

    odd = patches[:1, :21, :34]  # no multiple of the stride: continued with glass
    filled = np.full((1, 24, 36, 3), 255, np.uint8)
    filled[:, :21, :34] = odd
    np.testing.assert_allclose(served.predict(odd), load_engine(trained)(filled)[:, :, :21, :34], atol=1e-6)
    with pytest.raises(mlflow.exceptions.MlflowException, match="uint8"):
        served.predict(patches.astype(np.float32))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("models:/known@best", "aliases newest"),
        ("models:/unknown@newest", " in sqlite:"),
        ("models:/known/77", "version=77) not found"),
        ("models:/known", "neither an alias nor a version"),
        ("runs:/0123456789abcdef0123456789abcdef/model", "id=0123456789abcdef0123456789abcdef not found"),
        ("no/such/folder", "no such folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(reference, said, start, trained, shared_store):
    start().log_model(trained, ["rest", "gland"], "known", "newest")
    with pytest.raises(TrackingError) as caught:
        resolve_model(reference, shared_store)
    assert caught.value.subject == reference
    assert said in caught.value.found


@pytest.mark.parametrize(
    "content",
    [
        "flavors: {spark: {}}",
        "flavors: {python_function: {artifacts: null}}",
        "flavors: {python_function: {artifacts: {model: {path: x}}}}",
        "flavors: {python_function: {artifacts: {checkpoint: {uri: x}}}}",
        "flavors: {python_function: {artifacts: {checkpoint: {path: 3}}}}",
        "flavors: {",
        "3",
        "",
    ],
)
def test_an_mlflow_model_without_a_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "MLmodel").write_text(content)
    with pytest.raises(TrackingError, match="MLmodel: found an MLflow model of another kind, or a damaged one"):
        resolve_model(str(tmp_path))


def test_what_is_no_model_is_refused_before_anything_is_stored(start, trained, tmp_path, shared_store):
    run = start()
    with pytest.raises(CheckpointError):
        run.log_model(tmp_path, ["rest"], "never", "newest")
    for alias in ("latest", "v3"):
        with pytest.raises(TrackingError, match="keeps to itself"):
            run.log_model(trained, ["rest", "gland"], "never", alias)
    with pytest.raises(TrackingError, match="without a model"):
        resolve_model(f"runs:/{run.run_id}", shared_store)


def test_a_model_needs_a_store_that_exists(tmp_path):
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        resolve_model("models:/fullfield@newest")
    with pytest.raises(TrackingError, match="no such file"):
        resolve_model("models:/fullfield@newest", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_an_error_within_seconds(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}/")
    began = time.monotonic()
    with pytest.raises(TrackingError, match="refused") as caught:
        Run.start(tmp_path, "tests", "a run")
    assert time.monotonic() - began < 15
    assert "secret" not in str(caught.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    with socket.create_server(("127.0.0.1", port)):  # takes the call, and stays silent
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        with pytest.raises(TrackingError, match="timed out"):
            Run.start(tmp_path, "tests", "a run")


class Refusing(BaseHTTPRequestHandler):
    """A server that lets nobody in, and keeps how it was asked."""

    heard: ClassVar[list[str]] = []

    def do_POST(self):
        self.heard.append(self.headers.get("Authorization", ""))
        self.send_response(401)
        self.end_headers()

    do_GET = do_POST


@pytest.mark.parametrize(("host", "password"), [("127.0.0.1", True), ("localhost", False)])
def test_a_folder_s_store_takes_its_password_from_the_environment(tmp_path, monkeypatch, host, password):
    """And nothing else: where the variable names another store, the folder's counts."""
    monkeypatch.setattr(Refusing, "heard", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        port = server.server_port
        (tmp_path / "run.json").write_text(json.dumps({"store": f"http://***@127.0.0.1:{port}"}))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{host}:{port}")
        with pytest.raises(TrackingError) as caught:
            find_version(str(tmp_path))
        server.shutdown()
    assert ("Basic bWU6c2VjcmV0" in Refusing.heard) == password and Refusing.heard
    assert "MLFLOW_TRACKING_URI gives it with a password" in caught.value.__notes__[0]


def test_a_store_that_is_no_database_is_an_error_at_once(tmp_path):
    (tmp_path / "mlflow.db").write_text("This is no database, however long one looks at it. " * 40)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"mlflow\.db"):
        Run.start(tmp_path, "tests", "a run")
    with pytest.raises(TrackingError, match="in its path"):
        Run.start(tmp_path / "100%", "tests", "a run")
    assert time.monotonic() - began < 10


def test_the_command_that_opens_the_page_names_the_store(start, shared_store):
    run = start()
    command = run.open_command()
    assert command.endswith(f"ui --workers 1 --backend-store-uri '{shared_store}'")
    assert command.startswith(("mlflow ", sys.executable))


def test_a_store_from_the_environment_is_used(shared_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_store)
    run = Run.start(tmp_path / "out", "tests", "a run")
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == ["run.json"]
    beside = Path(shared_store.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert look(run).info.artifact_uri.startswith(beside.as_uri())


def test_an_experiment_that_another_process_has_just_made_is_taken(start, monkeypatch):
    store = start().store
    look_up, found = store.client.get_experiment_by_name, []

    def late(name):
        found.append(look_up(name) if found else None)
        return found[-1]

    monkeypatch.setattr(store.client, "get_experiment_by_name", late)
    assert store.experiment("tests", None) == start().experiment_id
    assert found[0] is None and found[1] is not None


def test_an_address_need_not_hold_the_outputs_path_where_the_store_is_another(start):
    assert look(start("50% #1")).info.run_name == "a run"
