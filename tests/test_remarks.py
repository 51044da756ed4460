"""What commands say, to files as well, so that nobody overlooks it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.architectures import build_network
from pipeline.checkpoint import save
from pipeline.classes import Class, Classes
from pipeline.errors import CheckpointError, CohortError, FullfieldError
from pipeline.files import replacing
from pipeline.footprint import with_footprint
from pipeline.metrics import POOLED
from pipeline.network import ModelSpec
from pipeline.phantom import make_cohort, render, write_slide
from pipeline.progress import console, new_table, progress, show
from pipeline.runtime import EXACT
from pipeline.settings import ClusterSettings
from pipeline.staining import Normalisation
from workflows.__main__ import app
from workflows.crossval import crossval
from workflows.evaluate import _shape_table, evaluate
from workflows.inspect import inspect
from workflows.run import run
from workflows.segment import segment
from workflows.study_commands import study_app
from workflows.sweep import sweep

DEMO = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))


def test_glass_and_a_stain_that_cannot_be_told_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tissue = render(3, 401, 303, 1.0, spread=3)[0]
    write_slide(tissue, tmp_path / "stained.tiff", 1.0)
    write_slide(np.full_like(tissue, 244), tmp_path / "glass.tiff", 1.0)
    dyes = Normalisation("reinhard", ((0.5, 0.6, 0.3), (0.1, 0.2, 0.1)))
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2, normalisation=dyes)
    torch.manual_seed(0)
    network = build_network(spec).eval()
    save(tmp_path / "model", with_footprint(spec, network), network)
    slides = [tmp_path / "stained.tiff", tmp_path / "glass.tiff"]
    where = ClusterSettings(workers=0)
    assert segment(slides, [str(tmp_path / "model")], tmp_path / "out", None, 128, where, EXACT) == 0
    with (tmp_path / "out" / "slides.csv").open(newline="") as file:
        reasons = {row["slide_id"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}
    status, reason = reasons["glass"]
    assert status == "done" and reason.startswith(
        "no tissue was found, and nothing examined; the stain is left as scanned: "
    )
    assert reasons["stained"] == ("done", "")
    said = capsys.readouterr().out
    assert f"done: glass: {reason}" in said
    assert "segment: blocks" in said and "2 of 2 slides" in said
    (tmp_path / "out" / "slides.csv").unlink()
    assert segment(slides, [str(tmp_path / "model")], tmp_path / "out", None, 128, where, EXACT) == 0
    assert reason in (tmp_path / "out" / "slides.csv").read_text()
    assert f"done: glass: {reason}" in capsys.readouterr().out


def test_who_goes_on_with_newer_code_finds_both_in_the_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slide(render(3, 401, 303, 1.0, spread=3)[0], tmp_path / "a.tiff", 1.0)
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2)
    network = build_network(spec).eval()
    save(tmp_path / "model", with_footprint(spec, network), network)
    provenance, where = tmp_path / "out" / "slides" / "a" / "provenance.json", ClusterSettings(workers=0)

    def codes_and_reason(code: str) -> tuple[str, str | None, str]:
        monkeypatch.setattr("pipeline.slide_job.source_digest", lambda: code)
        assert segment([tmp_path / "a.tiff"], [str(tmp_path / "model")], tmp_path / "out", None, 128, where, EXACT) == 0
        with (tmp_path / "out" / "slides.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        found = json.loads(provenance.read_text())
        return found["code"], found.get("begun_with_code"), row["reason"]

    assert codes_and_reason("old") == codes_and_reason("new") == ("old", None, "")  # what is finished is skipped
    provenance.unlink()  # as where the command was killed
    assert codes_and_reason("new") == ("new", "old", "begun and finished with different code of Fullfield")
    provenance.unlink()
    assert codes_and_reason("old") == ("old", None, "")


def test_a_slide_that_takes_the_place_of_another_has_a_row_of_its_own(tmp_path: Path) -> None:
    tissue = render(3, 401, 303, 1.0, spread=3)[0]
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2)
    network = build_network(spec).eval()
    save(tmp_path / "model", with_footprint(spec, network), network)

    def row(mpp: float | None = None) -> dict[str, str]:
        where = ClusterSettings(workers=0)
        assert segment([tmp_path / "a.tiff"], [str(tmp_path / "model")], tmp_path / "out", mpp, 128, where, EXACT) == 0
        with (tmp_path / "out" / "slides.csv").open(newline="") as file:
            (found,) = csv.DictReader(file)
        return found

    write_slide(tissue, tmp_path / "a.tiff", 1.0)
    first = row()
    assert row() == first and (first["reason"], first["megapixels"] != "0.0") == ("", True)
    shutil.rmtree(tmp_path / "out" / "slides" / "a")
    write_slide(np.full_like(tissue, 244), tmp_path / "a.tiff", 1.0)
    assert (row()["reason"], row()["megapixels"]) == ("no tissue was found, and nothing examined", "0.0")
    shutil.rmtree(tmp_path / "out" / "slides" / "a")
    write_slide(tissue, tmp_path / "a.tiff", 2.0)
    coarse, unused = "scanned at 2 um/px, and enlarged to the model's 1", "states 2 um/px, so that --mpp 0.5 is not used"
    assert row(0.5)["reason"] == f"{coarse}; {unused} (column `mpp` of a manifest would be)"


def test_results_of_many_runs_are_not_replaced_by_those_of_one(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "cohort", seed=1, slides=3, width=301, height=203, mpp=2.0)
    overrides = [f"output={tmp_path}", f"cohort.manifest={manifest}", "cluster.workers=0"]
    others = {
        "folds.csv": partial(sweep, overrides=[*overrides, "seed=1,2"]),
        "sweep.csv": partial(crossval, overrides=overrides, folds=2),
    }
    for name, other in others.items():
        (tmp_path / name).touch()
        for verb in (partial(run, overrides=overrides), partial(evaluate, overrides=overrides), other):
            with pytest.raises(CheckpointError, match="the results of `fullfield"):
                verb(DEMO)
        (tmp_path / name).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_a_folder_in_the_place_of_a_file_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "picture.png").mkdir()
    with pytest.raises(OSError, match="picture.png"), replacing(tmp_path / "picture.png") as partial:
        partial.write_bytes(b"pixels")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_the_last_note_is_told_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("blocks", 2) as bar:
        bar.advance(2, "0 of 1 slides")
        bar.advance(0, "1 of 1 slides")
    assert [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()] == ["0 of 1 slides", "1 of 1 slides"]


def shown_shapes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    """The lines of a table of figures with lesions, so many letters wide."""
    figures = {"object_f1": 0.872, "object_dice": 0.799, "object_hausdorff_um": 1234.5, "hd95_um": 3.3, "nsd": 0.7}
    figures["froc"] = 0.5
    bounds = {f"{name}_{end}": value for name, value in figures.items() for end in ("low", "high")}
    monkeypatch.setattr(console, "_width", width)
    show(_shape_table({"out-of-fold": {POOLED: {"Nucleus": {"objects": 7, **figures, **bounds}}}}))
    return capsys.readouterr().out.splitlines()


def test_a_narrow_table_is_broken_between_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = (shown_shapes(capsys, monkeypatch, width) for width in (80, 150))
    assert max(map(len, narrow)) == 80 and max(map(len, wide)) <= 150
    words, whole = (Counter(re.findall(r"[-\w.,]+", " ".join(lines))) for lines in (narrow, wide))
    assert words == whole and whole["out-of-fold"] == whole["0.799"] - 2 == 1


def test_nothing_is_cut_off_in_a_narrow_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 60)
    name = "Tumour_epithelium_high_grade"
    table = new_table("Dice", *(f"{name}_{number}" for number in range(8)))
    table.add_row(*(f"0.{number}23456789" for number in range(8)))
    show(table)
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 60


def test_a_long_path_is_told_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 60)
    path = tmp_path / "a_folder_whose_name_is_somewhat_long" / "slide.tiff"
    path.parent.mkdir()
    write_slide(np.full((90, 130, 3), 240, np.uint8), path, 0.5)
    inspect(path, False, None, None)
    assert str(path) in re.sub(r"\s", "", capsys.readouterr().out)


def test_a_terminal_that_tells_no_width_is_written_to(tmp_path: Path) -> None:
    write_slide(np.full((90, 130, 3), 240, np.uint8), tmp_path / "slide.tiff", 0.5)
    command = [sys.executable, "-m", "workflows", "inspect", str(tmp_path / "slide.tiff")]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "0"}, capture_output=True, text=True)
    assert done.returncode == 0 and "130 x 90 px" in done.stdout


def test_help_is_broken_where_the_terminal_ends() -> None:
    for command in (*app.registered_commands, *study_app.registered_commands):
        *paragraphs, last = str(command.help).split("\n\n")
        assert last.startswith("Example: `fullfield ") and not any("\n" in paragraph for paragraph in (*paragraphs, last))
        name = str(command.name or command.callback.__name__)
        assert "…" not in CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "90"}).output
    assert "weights.safetensors). Killed and called again, it goes on after the last whole epoch" in shown


@pytest.mark.parametrize("command", ["run FILE", "inspect FILE", "plan FILE --model m", "segment FILE --model m --output o"])
def test_a_file_that_may_not_be_read_is_told_by_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Of a slide of several that is a failed row; root may read all files, so that access is only said to be refused."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    done = CliRunner().invoke(app, command.replace("FILE", str(tmp_path / "file")).split())
    assert done.exit_code == 1 and isinstance(done.exception, FullfieldError)


@pytest.mark.parametrize("command", ["demo --output", "segment a.tiff --model m --output", "inspect a.tiff --picture"])
def test_an_empty_path_is_not_the_current_folder(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), ""], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and "should name a folder or a file; `.` is the current folder" in done.output


def test_a_list_of_problems_ends_on_a_line_of_its_own() -> None:
    assert str(CohortError("a", "two:\n  - one\n  - other", "none", "Mend it.")).endswith(
        "- other;\nexpected none. Mend it."
    )
