import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import checkpoint
from pipeline.addresses import without_password
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.cohort import Case
from pipeline.config_file import load_config
from pipeline.errors import CohortError
from pipeline.lineage import (
    Seen,
    as_used,
    case_facts,
    cases_facts,
    changes,
    made_here,
    note_used,
    read_lineage,
    seen_by,
    write_lineage,
)
from pipeline.network import ModelSpec
from pipeline.phantom import write_slide
from pipeline.tasks import Here
from workflows.reproduce import reproduce

CONFIGS = Path(__file__).parents[1] / "workflows" / "configs"


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Three small slides, one for each split, with a truth of each."""
    found = []
    for number, split in enumerate(("train", "val", "test")):
        slide, truth = tmp_path / f"{split}.tiff", tmp_path / f"{split}.geojson"
        write_slide(np.full((90, 130, 3), 100 * number, np.uint8), slide, 1.0)
        truth.write_text(split)
        found.append(Case(split, f"P{number}", slide, truth, split))
    return found


def test_a_model_has_seen_slides_and_patients(cases: list[Case], tmp_path: Path) -> None:
    classes = Classes((Class("Other", (0, 0, 0)), Class("Gland", (9, 9, 9))))
    spec = ModelSpec(architecture="fcn", classes=classes, mpp=1.0, patch_size=64, width=4, depth=2)
    slides = [case_facts(case) for case in cases]
    checkpoint.save(tmp_path / "model", spec, build_network(spec), ancestry={"slides": slides})
    train, val, _ = (facts["slide_digest"] for facts in slides)
    assert train != val and None not in (train, val)
    assert seen_by(tmp_path / "model", ("train",)) == Seen(frozenset({train}), frozenset({"P0"}))
    assert seen_by(tmp_path / "model", ("train", "val")) == Seen(frozenset({train, val}), frozenset({"P0", "P1"}))
    assert seen_by(tmp_path / "model", ()) == Seen(frozenset(), frozenset())


@pytest.mark.parametrize("name", ["version", "commit", "code", "python", "machine"])
def test_another_origin_is_told(name: str) -> None:
    here = made_here()
    (line,) = changes({"origins": [{**here, name: "another"}, here], "slides": []}, [])
    assert line.startswith(f"{name}: was another, is ")


def test_other_packages_are_told() -> None:
    here = made_here()
    then = {key: value for key, value in here["packages"].items() if key != "numpy"} | {"torch": "0.1", "gone": "3"}
    assert list(changes({"origins": [{**here, "packages": then}], "slides": []}, [])) == [
        "package gone: was 3, is not installed",
        f"package numpy: was not installed, is {here['packages']['numpy']}",
        f"package torch: was 0.1, is {here['packages']['torch']}",
    ]


def test_other_slides_and_truths_are_told_and_the_same_are_not(cases: list[Case]) -> None:
    then = {"origins": [made_here()], "slides": [case_facts(case) for case in cases]}
    assert not list(changes(then, then["slides"]))
    cases[0].annotation.write_text("other")
    write_slide(np.full((90, 130, 3), 7, np.uint8), cases[1].slide, 1.0)
    cases[2].slide.unlink()
    told = list(changes(then, [case_facts(case) for case in cases]))
    assert [line.partition(",")[0] for line in told] == ["annotation of train", "slide of val", "slide of test"]
    assert ["cannot be read" in line for line in told] == [False, False, True]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lineage: lineage["slides"][0].pop("annotation"),
        lambda lineage: lineage["slides"][0].pop("slide_digest"),
        lambda lineage: lineage["origins"].clear(),
        lambda lineage: lineage["origins"][0].pop("packages"),
        lambda lineage: lineage["origins"][0].pop("machine"),
        lambda lineage: lineage.update(slides=3),
        lambda lineage: lineage.pop("models"),
        dict.clear,
    ],
)
def test_a_lineage_of_another_shape_is_refused(cases: list[Case], tmp_path: Path, damage: Callable[[Any], object]) -> None:
    lineage = {"origins": [made_here()], "slides": [case_facts(case) for case in cases], "models": []}
    path = tmp_path / "lineage.json"
    path.write_text(json.dumps(lineage))
    assert read_lineage(path) == lineage
    damage(lineage)
    for content in (lineage, [], 3):
        path.write_text(json.dumps(content))
        with pytest.raises(CohortError, match=f"{path}: found .* expected the lineage of a run"):
            read_lineage(path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_lineage_is_put_aside(tmp_path: Path, text: str) -> None:
    (tmp_path / "lineage.json").write_text(text)
    write_lineage(tmp_path, {"models": []})
    assert (tmp_path / "lineage.json.old").read_text() == text
    assert json.loads((tmp_path / "lineage.json").read_text())["models"] == []


def test_facts_are_those_of_the_files_that_were_used(cases: list[Case], tmp_path: Path) -> None:
    """What takes a file's place changes nothing until it is used itself."""
    first = cases_facts(cases, Here())
    write_lineage(
        tmp_path, {"slides": as_used(tmp_path, [*first[:2], {**first[2], "annotation": None, "annotation_digest": None}])}
    )
    cases[0].annotation.write_text("other")
    write_slide(np.full((90, 130, 3), 7, np.uint8), cases[1].slide, 1.0)
    moved = [*cases[:2], replace(cases[2], patient="P9")]
    now = cases_facts(moved, Here())
    assert as_used(tmp_path, now) == [*first[:2], now[2]]
    found = json.loads(note_used(tmp_path, now[:1]).read_text())["slides"]
    assert found[:2] == [now[0], first[1]] and now[0] != first[0] and now[1] != first[1]


def test_a_store_is_not_written_as_mlflow_keeps_it_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host/mlflow")
    write_lineage(tmp_path, {"slides": [], "models": []})
    for uri in ("https://me:secret@host/mlflow/", "https://host"):
        config = load_config(CONFIGS / "demo.yaml", [f"tracking.uri={uri}"])
        (tmp_path / "config.yaml").write_text(without_password(config.to_yaml()))
        assert reproduce(str(tmp_path), tmp_path / "again") == 0
        written, told = (tmp_path / "again" / "config.yaml").read_text(), capsys.readouterr().out
        found = load_config(tmp_path / "again" / "config.yaml").tracking.uri
        assert "secret" not in written and "secret" not in told
        if uri == "https://host":
            assert found == uri and "tracking.uri" not in told
        else:
            assert found is None
            assert "tracking.uri was https://***@host/mlflow/" in told and "so that MLFLOW_TRACKING_URI decides" in told
