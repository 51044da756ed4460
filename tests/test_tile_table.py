"""The table of tiles: what it has serves again while nothing has changed on which it depends."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.cells import read_cells, read_columns
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import SlideError, TrainingError, WorkerError
from pipeline.patches import read_index
from pipeline.tile_table import TileFacts, TileTable, columns, read_facts

DEMO = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
DAMAGED = SlideError("c", "nothing", "a slide", "Copy it again.")
DIED = WorkerError("a worker", "its death", "a life", "Free memory.")


@pytest.fixture
def config() -> Config:
    return load_config(DEMO)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Three cases of files that differ in their sizes, the last without an annotation."""
    made = []
    for number, name in enumerate("abc", 1):
        slide, annotation = tmp_path / f"{name}.tiff", tmp_path / f"{name}.geojson"
        slide.write_bytes(b"x" * number)
        annotation.write_bytes(b"{" * number)
        made.append(Case(name, f"P{name}", slide, annotation if name != "c" else None, "train"))
    return made


def rows_of(case: Case, config: Config, corners: Iterable[tuple[int, int]]) -> pa.Table:
    """Rows as `fullfield tile` counts them, at places (x, y)."""
    schema, ids = columns(config), {"slide_id": case.slide_id, "patient": case.patient, "split": case.split}
    return pa.Table.from_pylist([{**dict.fromkeys(schema.names, 0.5), **ids, "x": x, "y": y} for x, y in corners], schema)


def written(path: Path, config: Config, cases: Sequence[Case]) -> TileFacts:
    """Write a table that has rows of all but the last case, which cannot be read."""
    table = TileTable(path, config, cases)
    for case in reversed(cases[:-1]):
        table.add(case, rows_of(case, config, [(0, 0), (9, 0), (0, 9)]))
    table.leave_out(cases[-1], DAMAGED)
    table.write(path)
    found = read_facts(path)
    assert found is not None and found == table.facts
    return found


def places(path: Path) -> list[tuple[object, ...]]:
    return [tuple(row[name] for name in ("slide_id", "split", "y", "x")) for row in parquet.read_table(path).to_pylist()]


def test_what_has_not_changed_is_not_counted_again(tmp_path: Path, config: Config, cases: list[Case]) -> None:
    path = tmp_path / "tiles.parquet"
    facts = written(path, config, cases)
    assert places(path) == [(name, "train", y, x) for name in "ab" for y, x in ((0, 0), (0, 9), (9, 0))]
    assert facts.is_of(config, cases[::-1]) and facts.to_count(cases) == []
    assert facts.left_out["c"].why == str(DAMAGED)
    fourth = replace(cases[0], slide_id="d")
    assert not facts.is_of(config, [*cases, fourth]) and TileTable(path, config, [*cases, fourth]).facts.to_count(
        [*cases, fourth]
    ) == [fourth]
    assert not facts.is_of(config, cases[:2]) and facts.to_count(cases[:2]) == []

    for later in (replace(cases[0], annotation=None), replace(cases[1], mpp=0.5), replace(cases[2], mpp=0.5)):
        changed = [later if case.slide_id == later.slide_id else case for case in cases]
        assert facts.to_count(changed) == TileTable(path, config, changed).facts.to_count(changed) == [later]
    cases[0].annotation.write_text("{ }")
    cases[2].slide.write_text("another")
    assert facts.to_count(cases) == [cases[0], cases[2]]
    assert not facts.is_of(config, cases)
    cases[0].annotation.write_text("{")
    assert facts.is_of(config, cases), "the slide that it leaves out may be another by now: there is nothing of it to learn"


def test_rows_serve_in_other_splits(tmp_path: Path, config: Config, cases: list[Case]) -> None:
    path, other = tmp_path / "tiles.parquet", tmp_path / "other.parquet"
    facts = written(path, config, cases)
    dealt = [replace(case, split="val", patient="X") for case in cases[1:]]
    assert not facts.is_of(config, dealt)
    table = TileTable(path, config, dealt)
    assert table.facts.to_count(dealt) == []
    table.write(other)
    assert places(other) == [("b", "val", y, x) for y, x in ((0, 0), (0, 9), (9, 0))]
    assert set(parquet.read_table(other)["patient"].to_pylist()) == {"X"}
    assert table.facts.is_of(config, dealt) and read_facts(other) == table.facts


def test_a_slide_whose_worker_died_is_left_out_and_tried_again(tmp_path: Path, config: Config, cases: list[Case]) -> None:
    path = tmp_path / "tiles.parquet"
    table = TileTable(path, config, cases[:1])
    table.leave_out(cases[0], DIED)
    table.write(path)
    assert table.facts.is_of(config, cases[:1]) and TileTable(path, config, cases[:1]).facts.to_count(cases[:1]) == cases[:1]
    assert parquet.read_table(path).schema.equals(columns(config))


@pytest.mark.parametrize("override", ["tiles.patch_size=96", "network.mpp=4", "tissue.mpp=9", "annotations.rest=Stroma"])
def test_cells_that_were_counted_otherwise_do_not_serve(
    tmp_path: Path, config: Config, cases: list[Case], override: str
) -> None:
    path, other = tmp_path / "tiles.parquet", load_config(DEMO, [override])
    assert not written(path, config, cases).is_of(other, cases)
    assert TileTable(path, other, cases).facts.to_count(cases) == cases


def test_cells_are_counted_anew_by_another_version(
    tmp_path: Path, config: Config, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.parquet"
    facts = written(path, config, cases)
    monkeypatch.setattr("pipeline.tile_table.__version__", "0.0.1")
    assert not facts.is_of(config, cases) and TileTable(path, config, cases).facts.to_count(cases) == cases


def test_a_damaged_table_is_none(tmp_path: Path, config: Config, cases: list[Case]) -> None:
    path = tmp_path / "tiles.parquet"
    written(path, config, cases)
    whole, rng = path.read_bytes(), np.random.default_rng(7)
    for place in len(whole) - rng.integers(9, min(600, len(whole)), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        read_facts(path)  # whatever it finds, it does not fail
    path.write_bytes(b"PAR1")
    assert read_facts(path) is None


def test_rows_that_are_damaged_are_told_and_counted_anew(tmp_path: Path, config: Config, cases: list[Case]) -> None:
    path = tmp_path / "tiles.parquet"
    facts, whole = written(path, config, cases), path.read_bytes()
    path.write_bytes(whole[:4] + bytes(50) + whole[54:])
    assert read_facts(path) == facts, "what it tells of itself is whole"
    for read in (read_cells, lambda path: read_index(path, config.class_list.names, "train")):
        with pytest.raises(TrainingError, match=f"{path}: found a damaged table; .* Delete it") as caught:
            read(path)
        assert caught.value.subject == str(path)
    assert TileTable(path, config, cases).facts.to_count(cases) == cases
    path.write_bytes(whole)
    assert read_cells(path, ["x"]).num_rows == read_cells(path, split="train").num_rows == 6


@pytest.mark.parametrize("way", ["missing", "folder"])
def test_a_table_that_is_no_file_is_told_by_its_name(tmp_path: Path, way: str) -> None:
    path = tmp_path / "tiles.parquet"
    if way == "folder":
        path.mkdir()
    for read in (read_cells, read_columns):
        with pytest.raises(FileNotFoundError if way == "missing" else IsADirectoryError) as caught:
            read(path)
        assert caught.value.filename == str(path)


def test_a_file_out_of_reach_is_told_as_a_missing_one(tmp_path: Path, config: Config, cases: list[Case]) -> None:
    path, (case, *_) = tmp_path / "tiles.parquet", cases
    table = TileTable(path, config, [case])
    case.slide.unlink()
    table.leave_out(case, DAMAGED)
    assert table.facts.to_count([case]) == []
    assert table.facts.to_count([replace(case, slide=case.annotation)]) != []
