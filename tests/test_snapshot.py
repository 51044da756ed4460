"""The state of an interrupted training: always whole, and never another training's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import TrainingError
from pipeline.snapshot import Record, Standing, beside, load, read_standing, save
from pipeline.staining import Normalisation

RECORDS = (Record(1, {"loss": 2.0, "dice": 0.5}, True, 9), Record(2, {"loss": 1 / 3}, False, 8, ("a",), "", ("a", "b")))
STANDING = Standing({"seed": "0", "training.epochs": "9"}, RECORDS, 12.5, Normalisation("macenko", ((0.1, 1 / 3, 0.2),) * 2))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = beside(tmp_path / "model.partial")
    assert read_standing(path) is None
    tensors = {"a.b": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last), "step": torch.tensor(7.0)}
    save(path, STANDING, tensors)
    assert read_standing(path) == STANDING
    standing, found = load(path)
    assert standing == STANDING
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_the_best_is_that_of_all_epochs() -> None:
    assert not STANDING.is_best({"dice": 0.5}, ())
    assert STANDING.is_best({"dice": 0.75}, ())
    assert Standing({}, (), 0.0).is_best({"dice": 0.0}, ()) and Standing({}, (), 0.0).is_best({}, ())


@pytest.mark.parametrize(
    ("epochs", "kept"),
    [
        ([(0.5, ""), (0.9, "a"), (None, "ab"), (0.6, "")], [1, 4]),  # fewer slides may be the easier ones
        ([(0.9, "a"), (0.5, ""), (0.4, ""), (0.95, "a")], [1, 2]),
        ([(0.9, "a"), (0.95, "b"), (0.5, ""), (0.6, "")], [1, 3, 4]),
        ([(0.5, "a"), (0.4, "a"), (0.6, "a")], [1, 3]),  # one that can never be read is missed by all alike
        ([(None, "ab"), (0.2, "a"), (0.1, "a"), (None, "ab")], [1, 2]),
        ([(None, ""), (None, ""), (None, "")], [1, 2, 3]),
    ],
)
def test_an_epoch_counts_for_less_where_its_validation_missed_what_another_saw(
    epochs: list[tuple[float | None, str]], kept: list[int]
) -> None:
    standing = Standing({}, (), 0.0)
    for number, (dice, missed) in enumerate(epochs, 1):
        metrics = {} if dice is None else {"dice": dice}
        record = Record(number, metrics, standing.is_best(metrics, tuple(missed)), 9, missed=tuple(missed))
        standing = standing.after(record, 0.0)
    assert [record.epoch for record in standing.records if record.best] == kept


def test_what_differs_is_named() -> None:
    assert STANDING.changes({"training.epochs": "9", "seed": "0"}) == ""
    assert STANDING.changes({"training.epochs": "10", "seed": "0"}) == "training.epochs was 9"
    assert STANDING.changes({"training.epochs": "9", "seed": "0", "slide a": "x"}) == "slide a was not there"
    assert "and 2 more" in STANDING.changes({f"slide {number}": "x" for number in range(4)})


@pytest.mark.parametrize(
    "damage", [lambda data: data[:40], lambda data: b"", lambda data: data.replace(b"fullfield", b"otherwise")]
)
def test_a_broken_state_is_told(tmp_path: Path, damage) -> None:
    path = tmp_path / "training.safetensors"
    save(path, STANDING, {"a": torch.zeros(9)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainingError, match=r"training\.safetensors.*Delete it"):
        read_standing(path)


WRITER = """
import sys
from pathlib import Path
import torch
from pipeline.snapshot import Standing, save
for number in range(1, 10**6):
    save(Path(sys.argv[1]), Standing({"number": str(number)}, (), 0.0), {"a": torch.full((1 << 18,), float(number))})
"""


def test_it_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path, seen = tmp_path / "training.safetensors", set()
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    while len(seen) < 10 and process.poll() is None:
        if path.exists():
            standing, tensors = load(path)
            assert set(tensors["a"].tolist()) == {float(standing.inputs["number"])}
            seen.add(standing.inputs["number"])
        time.sleep(0.003)
    process.kill()
    process.wait()
    assert len(seen) == 10
    last, tensors = load(path)
    assert set(tensors["a"].tolist()) == {float(last.inputs["number"])}


def test_those_who_may_read_other_files_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save(tmp_path / "state", STANDING, {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o644
