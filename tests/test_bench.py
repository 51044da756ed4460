"""The bench: its slides show what they say, its runs survive a restart, and its report says what was measured."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.labels import Labels, differing
from benchmarks.process import measure
from benchmarks.record import Key, Plan, Record, Run
from benchmarks.report import median, write_report
from benchmarks.slides import CELL, blobs, make_slide, texture, write_slide
from pipeline.classes import IGNORED
from pipeline.geometry import Roi
from pipeline.slide import open_slide

EXACT = Run(Key(8192, 1.0, "fcn", "fullfield, exact"), 10.0, 8.0, 7.0, 16.0, 2**30, 64.0, 1024)


def test_a_slide_shows_texture_where_there_is_tissue_and_glass_elsewhere(tmp_path: Path) -> None:
    tissue = np.array([[True, False, True], [False, True, True]])
    write_slide(tissue, tmp_path / "slide.tiff")
    slide = open_slide(tmp_path / "slide.tiff")
    assert [level.shape for level in slide.levels] == [(2 * CELL >> level, 3 * CELL >> level) for level in range(4)]
    whole = np.where(np.kron(tissue, np.ones((CELL, CELL), bool))[..., None], np.tile(texture(), (2, 3, 1)), 245)
    for level, lattice in enumerate(slide.levels):
        rows, columns = lattice.shape
        expected = whole.reshape(rows, 2**level, columns, 2**level, 3).mean(axis=(1, 3))
        found = slide.read(lattice.roi, lattice)
        differ, shifted = (np.abs(found - np.roll(expected, by, axis=(0, 1))).mean() for by in ((0, 0), (1, 1)))
        assert differ < 5 and shifted > 3 * differ, f"level {level}"


def test_blobs_have_the_share_and_the_shape_at_every_size(tmp_path: Path) -> None:
    small, large = blobs(16, 0.3), blobs(64, 0.3)
    assert abs(small.mean() - 0.3) <= 0.5 / 16**2 and abs(large.mean() - 0.3) <= 0.5 / 64**2
    assert np.mean(large.reshape(16, 4, 16, 4).mean(axis=(1, 3)).round() == small) > 0.9
    assert not np.array_equal(small, small.T)
    path = make_slide(tmp_path, CELL, 1.0)
    made = path.stat().st_mtime_ns
    assert make_slide(tmp_path, CELL, 1.0).stat().st_mtime_ns == made


def test_labels_that_were_not_examined_do_not_count_and_take_no_disk(tmp_path: Path) -> None:
    labels = Labels.create(tmp_path / "labels.npy", (3000, 5000))
    labels.write(Roi(4000, 2000, 2, 3), np.array([[0, 1], [2, 2], [IGNORED, 2]]))
    reference = Labels.open(tmp_path / "labels.npy")
    assert np.array_equal(reference.read(Roi(3999, 2000, 3, 1)), [[IGNORED, 0, 1]])
    found = np.full((3000, 5000), 7, np.uint8)
    found[2000:2003, 4000:4002] = [[0, 2], [2, IGNORED], [1, 2]]
    assert differing(lambda top, bottom: found[top:bottom], reference) == 0.25
    assert (tmp_path / "labels.npy").stat().st_blocks * 512 < 2**20


def test_a_command_is_measured_with_its_children() -> None:
    hold = "held = bytes(range(256)) * 2**19; import time; time.sleep(0.5)"
    used = measure([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"], {})
    assert not used.error and used.peak_bytes > 2**27 and used.seconds > 0.5
    assert measure([sys.executable, "-c", "import sys; sys.exit('no memory')"], {}).error == "no memory"


def test_a_record_goes_on_where_it_stopped_unless_the_code_is_another(tmp_path: Path) -> None:
    record = Record(tmp_path / "peers.json")
    record.add(EXACT, Plan(8192, 1.0, "fcn", 1024, 1.13, 9.0, 2**30), "a remark")
    record.add(replace(EXACT, whole=30.0))
    again = Record(record.path)
    assert again.of(EXACT.key) == [EXACT, replace(EXACT, whole=30.0)]
    assert (again.plans, again.remarks) == (record.plans, record.remarks)
    record.path.write_text(record.path.read_text().replace(record.conditions["code"], "other code"))
    assert Record(record.path).runs == []
    assert Record.read(record.path).conditions["code"] == "other code"


def test_medians_count_but_the_highest_peak_and_an_error() -> None:
    runs = [replace(EXACT, whole=seconds, peak_bytes=size) for seconds, size in ((3.0, 5), (1.0, 9), (2.0, 7))]
    assert (median(runs).whole, median(runs).peak_bytes) == (2.0, 9)
    assert median([*runs, Run(EXACT.key, error="broken")]).error == "broken"


@pytest.mark.parametrize("sections", [("peers",), ("growth", "huge"), ("peers", "growth", "dense")])
def test_the_report_is_drawn_from_what_there_is(tmp_path: Path, sections: tuple[str, ...]) -> None:
    named = {
        "limit, exact": replace(EXACT, seconds=6.0),
        "pyFAST": Run(EXACT.key, error="not | installed"),
        "MONAI SlidingWindowInferer, as shipped": replace(EXACT, whole=50.0, seconds=40.0, differ=0.25),
    }
    for section in sections:
        record = Record(tmp_path / f"{section}.json")
        if section == "peers":
            record.add(EXACT, *(replace(run, key=replace(EXACT.key, contender=name)) for name, run in named.items()))
        elif section == "dense":
            record.add("42 times faster")
        else:
            sizes = {"growth": (8192, 16384), "huge": (131072,)}[section]
            keys = (Key(size, 0.3, "unet", "fullfield, exact", workers) for size in sizes for workers in (1, 2))
            record.add(*(replace(EXACT, key=key) for key in keys))
    write_report(tmp_path)
    said = (tmp_path / "bench.md").read_text()
    assert [line for line in said.splitlines() if line.startswith("## ")] == [f"## {section}" for section in sections]
    tables = [line for line in said.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} <= {11}
    if "peers" in sections:
        assert "| 5.00 | 5.00 |" in said and "25.000%" in said and "not / installed" in said
        assert "0.750 after start-up, 0.857 over the tiles alone" in said
    with Image.open(tmp_path / "bench.png") as picture:
        assert len(picture.convert("L").getcolors()) > 10
