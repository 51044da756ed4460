"""Which epoch of a training is kept, and what it learns from."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from pyarrow import parquet

from pipeline import checkpoint, fitting, inputs, snapshot, validation
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.config_file import parse_config
from pipeline.errors import SlideError, TrainingError
from pipeline.fitting import fit
from pipeline.phantom import write_slide
from pipeline.processes import Meeting, _environment
from pipeline.slide import open_slide
from pipeline.snapshot import Record, Standing
from pipeline.specs import model_spec

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEIGHT = 192, 130


def config(folder: Path, **training: object) -> Config:
    content = {
        "output": str(folder),
        "cohort": {"manifest": "cohort.csv"},
        "classes": [{"name": "Light", "color": "#ffffff"}, {"name": "Dark", "color": "#000000"}],
        "annotations": {"rest": "Light"},
        "network": {"mpp": 1.0, "architecture": "fcn", "width": 4, "depth": 2},
        "tissue": {"min_area_um2": 0},
        "tiles": {"patch_size": 32},
        "training": {"patches_per_epoch": 32, "weight_average": 0.5, **training},
    }
    return parse_config(content, "test")


def case(folder: Path, split: str, left: int) -> Case:
    """A slide whose right half is dark, and an outline of Dark that is as wide and begins at column `left`."""
    image = np.random.default_rng(1).integers(170, 250, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:, WIDTH // 2 :] //= 3
    slide, annotation = folder / f"{split}.tiff", folder / f"{split}.geojson"
    write_slide(image, slide, 1.0)
    right = left + WIDTH // 2
    ring = [[left, 0], [right, 0], [right, HEIGHT], [left, HEIGHT], [left, 0]]
    label = {"objectType": "annotation", "classification": {"name": "Dark"}}
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": label}
    annotation.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return Case(split, split, slide, annotation, split)


def train(folder: Path, settings: Config, validated: int) -> list[Record]:
    """Train on one slide, and validate on one where Dark is said to begin at column `validated`."""
    cases = [case(folder, "train", WIDTH // 2), case(folder, "val", validated)]
    return list(fit(settings, cases, cells(folder), folder / "model", "inputs"))


def cells(folder: Path) -> Path:
    """What there is to learn from on the slide that trains."""
    places = {"slide_id": ["train"] * 2, "split": ["train"] * 2, "x": [48, 112], "y": [48, 48]}
    parquet.write_table(pa.table({**places, "Light": [1.0, 0.0], "Dark": [0.0, 1.0]}), folder / "tiles.parquet")
    return folder / "tiles.parquet"


@pytest.mark.parametrize(("device", "devices", "readers"), [("cpu", 1, 1), ("cuda", 1, 6), ("cuda", 2, 3)])
def test_all_threads_prepare_patches_for_gpus_that_train_and_one_for_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, devices: int, readers: int
) -> None:
    """Whether this machine has a GPU or not: that of a Mac has no part in it. Several processes share the threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setattr(os, "environ", _environment(Meeting("127.0.0.1", 1, devices, 1), 0, devices - 1))
    stream = fitting._stream(config(tmp_path, devices=devices), cells(tmp_path), {}, torch.device(device))
    assert stream.threads == readers


@pytest.mark.parametrize("validated", [WIDTH // 2, 0], ids=["what is right", "what is wrong"])
def test_the_epoch_that_did_best_on_validation_is_kept(tmp_path: Path, validated: int) -> None:
    """Where the truth of the slide that validates is wrong, the more is learned, the worse it looks."""
    records = train(tmp_path, config(tmp_path, epochs=5, learning_rate=0.03), validated)
    dice = [record.metrics["dice"] for record in records]
    assert [record.best for record in records] == [value > max(dice[:at], default=-1) for at, value in enumerate(dice)]
    kept = checkpoint.load_run_record(tmp_path / "model")["epoch"]
    assert kept == 1 + dice.index(max(dice))
    assert (kept > 1 and max(dice) > 0.9) if validated else (kept < 5 and dice[-1] < 0.1)


def test_what_was_not_examined_is_validated_as_background(tmp_path: Path) -> None:
    counts, spec = np.array([[5, 0, 20], [0, 70, 10]]), model_spec(config(tmp_path))
    assert fitting._dice(counts, spec, 0) == {"Light": 2 * 25 / (25 + 35), "Dark": 2 * 70 / (80 + 70)}
    assert fitting._dice(counts, spec, None) == {"Light": 2 * 5 / (25 + 5), "Dark": 2 * 70 / (80 + 70)}


def test_what_is_kept_is_always_of_an_epoch_that_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the weights of the third epoch and its state; made again, the third is worse than the second.

    On a processor it would be as good again, as on a GPU it need not be: so here the state has forgotten what was learned.
    """
    settings, state = config(tmp_path, epochs=4, learning_rate=0.03), snapshot.beside(tmp_path / "model")
    usual = snapshot.save

    def killed(path: Path, standing: Standing, tensors: Mapping[str, torch.Tensor]) -> None:
        if len(standing.records) == 3:
            assert standing.records[-1].best and checkpoint.load_run_record(tmp_path / "model")["epoch"] == 3
            raise KeyboardInterrupt
        usual(path, standing, tensors)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(snapshot, "save", killed)
        train(tmp_path, settings, WIDTH // 2)
    standing, tensors = snapshot.load(state)
    forgotten = {name: torch.zeros_like(value) for name, value in tensors.items() if name.startswith(("network", "average"))}
    snapshot.save(state, standing, {**tensors, **forgotten})
    records = train(tmp_path, settings, WIDTH // 2)
    assert [record.best for record in records] == [True, True, False, False]
    kept = checkpoint.load_run_record(tmp_path / "model")
    assert kept["epoch"] == 2
    assert kept["dice"] == {name: records[1].metrics[f"dice {name}"] for name in kept["dice"]}
    assert not list(tmp_path.glob("*.partial"))


def test_a_kill_after_the_state_leaves_no_earlier_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, usual = config(tmp_path, epochs=2, learning_rate=0.03), snapshot.save

    def killed(path: Path, standing: Standing, tensors: Mapping[str, torch.Tensor]) -> None:
        usual(path, standing, tensors)
        if len(standing.records) == 2:
            assert standing.records[-1].best
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(snapshot, "save", killed)
        train(tmp_path, settings, WIDTH // 2)
    assert list(tmp_path.glob("*.partial"))
    train(tmp_path, settings, WIDTH // 2)
    assert checkpoint.load_run_record(tmp_path / "model")["epoch"] == 2
    assert not list(tmp_path.glob("*.partial"))


def test_an_epoch_that_could_not_be_validated_does_not_replace_one_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that is away for a moment: as the second epoch is validated, and as the training goes on after it."""
    settings = config(tmp_path, epochs=3)
    cases = [case(tmp_path, "train", WIDTH // 2), case(tmp_path, "val", WIDTH // 2)]
    first, second = (fit(settings, cases, cells(tmp_path), tmp_path / "model", "inputs") for _ in range(2))
    assert (record := next(first)).best and not record.missed

    def away(*arguments: Any) -> Any:
        raise SlideError("val.tiff", "Stale file handle", "pixels", "Copy it again.")

    monkeypatch.setattr(validation, "_count", away)
    record = next(first)
    assert "dice" not in record.metrics and not record.best and record.missed == record.unread == ("val",)
    assert checkpoint.load_run_record(tmp_path / "model")["epoch"] == 1
    first.close()
    monkeypatch.setattr(validation, "_survey", lambda *arguments: None)
    with pytest.raises(TrainingError, match="val.*earlier epochs"):
        next(second)


def test_a_state_of_other_inputs_than_a_worker_finds_is_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a slide cannot be opened for a moment, of which the command knew nothing."""
    settings, state, usual = config(tmp_path, epochs=2), snapshot.beside(tmp_path / "model"), inputs.slide_digest
    cases = [case(tmp_path, "train", WIDTH // 2), case(tmp_path, "val", WIDTH // 2)]
    first = next(fit(settings, cases, cells(tmp_path), tmp_path / "model", "inputs"))
    with monkeypatch.context() as patched, pytest.raises(TrainingError, match=r"training\.safetensors.*slide val was"):
        patched.setattr(inputs, "slide_digest", lambda path: None if path.stem == "val" else usual(path))
        next(fit(settings, cases, cells(tmp_path), tmp_path / "model", "inputs"))
    assert snapshot.read_standing(state).records == (first,)
    assert list(fit(settings, cases, cells(tmp_path), tmp_path / "model", "inputs"))[0] == first


def test_a_slide_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    slide = case(tmp_path, "train", 0).slide
    content, time = slide.read_bytes(), slide.stat().st_mtime_ns
    found = []
    for there in (bytes(len(content)), content):
        with slide.open("r+b") as file:  # the same file of the same size and time
            file.write(there)
        os.utime(slide, ns=(time, time))
        found.append(inputs.slide_digest(slide))
    assert found == [None, open_slide(slide).digest()]


def test_a_training_that_outlives_its_command_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, state = config(tmp_path, epochs=3), snapshot.beside(tmp_path / "model.partial")
    arguments = [case(tmp_path, "train", WIDTH // 2)], cells(tmp_path), tmp_path / "model.partial", "inputs"
    orphan, waited = fit(settings, *arguments), []
    first = next(orphan)

    def while_waiting(seconds: float) -> None:
        waited.append(next(orphan))
        orphan.close()

    monkeypatch.setattr(fitting, "sleep", while_waiting)
    records = list(fit(settings, *arguments))
    assert [record.epoch for record in records] == [1, 2, 3] and records[:2] == [first, *waited]
    (tmp_path / "model.partial").rename(tmp_path / "model")
    state.unlink()
    with pytest.raises(TrainingError, match="finished"):  # what waited so long has no command any more
        next(fit(settings, *arguments))
    assert not state.exists()


def damaged(case: Case, name: str) -> Case:
    """Another slide of the same patient, whose pixels cannot be read."""
    with tifffile.TiffFile(case.slide) as file:
        offset, length = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    content = case.slide.read_bytes()
    (case.slide.parent / f"{name}.tiff").write_bytes(content[:offset] + bytes(length) + content[offset + length :])
    return replace(case, slide_id=name, slide=case.slide.parent / f"{name}.tiff")


def test_what_cannot_be_read_is_passed_over_and_named(tmp_path: Path) -> None:
    good = [case(tmp_path, "train", WIDTH // 2), case(tmp_path, "val", WIDTH // 2)]
    bad = [damaged(one, f"bad {one.split}") for one in good]
    cells = {"slide_id": ["train", "bad train"], "split": ["train"] * 2, "x": [80] * 2, "y": [48] * 2, "Light": [1.0] * 2}
    parquet.write_table(pa.table({**cells, "Dark": [1.0] * 2}), tmp_path / "tiles.parquet")
    settings = config(tmp_path, epochs=2)
    without, found = (
        list(fit(settings, cases, tmp_path / "tiles.parquet", tmp_path / str(len(cases)) / "model", "inputs"))
        for cases in ([*good, bad[0]], [*good, *bad])
    )
    assert [record.unread for record in without] == [("bad train",)] * 2
    assert [record.unread for record in found] == [("bad train", "bad val")] * 2
    dice = [[record.metrics["dice"] for record in records] for records in (without, found)]
    assert dice[0] == dice[1]


def test_the_first_step_is_computed_in_fp32_as_all_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convolutions, usual, found = torch.backends.cudnn.conv, fitting._batches, []

    def batches(*arguments: Any) -> Any:
        for batch in usual(*arguments):
            found.append(convolutions.fp32_precision)
            yield batch

    monkeypatch.setattr(fitting, "_batches", batches)
    convolutions.fp32_precision = "tf32"  # as torch has it for a GPU, until it is told
    train(tmp_path, config(tmp_path, epochs=1, patches_per_epoch=8, precision="exact"), 0)
    assert set(found) == {"ieee"}


def test_patches_are_changed_as_far_as_the_configuration_says(tmp_path: Path) -> None:
    still = {"rotation_degrees": 0.0, "scale": 0.0, "elastic_px": 0.0, "blur_px": 0.0, "stain": 0.0, "tint": 0.0}
    losses = []
    for name, augmentation in (("one", {}), ("two", {}), ("three", still)):
        (tmp_path / name).mkdir()
        (record,) = train(tmp_path / name, config(tmp_path, epochs=1, patches_per_epoch=8, augmentation=augmentation), 0)
        losses.append(record.metrics["loss"])
    assert losses[0] == losses[1] != losses[2]
