import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline import checkpoint
from pipeline.architectures import build_network
from pipeline.classes import IGNORED
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.config_file import parse_config
from pipeline.errors import CheckpointError, CohortError, ConfigError
from pipeline.folder import alone, write_setup
from pipeline.geometry import Roi
from pipeline.histology import GLASS
from pipeline.inputs import check_output, training_inputs
from pipeline.phantom import make_phantom
from pipeline.registry import check_alias
from pipeline.sources import open_sources
from pipeline.specs import class_map, model_spec, read_config
from pipeline.tasks import Here
from pipeline.truth import ClassMap
from pipeline.workspace import Workspace, alias_of, dealt_cases, open_workspace


def config(folder: Path, *overrides: str) -> Config:
    content = {
        "output": str(folder),
        "cohort": {"manifest": "cohort.csv"},
        "classes": [
            {"name": "Glass", "color": "#ffffff", "values": [7]},
            {"name": "Gland", "color": "#008000", "annotations": ["Acinus", "Duct"], "values": [1, 3]},
        ],
        "network": {"mpp": 2.0, "architecture": "fcn", "width": 4, "depth": 2},
    }
    return parse_config(content, "test", overrides)


def test_what_a_configuration_says_of_names_and_values_is_how_truth_is_read(tmp_path: Path) -> None:
    said = config(tmp_path, "annotations={known: [Region*], ignored: [Fold], rest: Glass, unnamed: Gland}")
    assert class_map(said) == ClassMap(
        classes=said.class_list,
        names={"Glass": 0, "Acinus": 1, "Duct": 1},
        known=("Region*",),
        ignored=("Fold",),
        rest=0,
        unnamed=1,
        values={7: 0, 1: 1, 3: 1},
    )
    assert class_map(config(tmp_path)) == ClassMap(
        said.class_list, {"Glass": 0, "Acinus": 1, "Duct": 1}, values={7: 0, 1: 1, 3: 1}
    )


def test_glass_beside_the_known_is_learned_but_not_validated_on(tmp_path: Path) -> None:
    phantom = make_phantom(tmp_path / "slide.tiff", 4, 801, 602, 2.0)
    ring = [[380, 290], [420, 290], [420, 320], [380, 320], [380, 290]]
    known = {"objectType": "annotation", "classification": {"name": "Region"}}
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": known}
    phantom.annotation.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    cases = [Case(split, split, phantom.slide, phantom.annotation, split) for split in ("train", "val")]
    sources, _ = open_sources(cases, config(tmp_path, "annotations={known: [Region], rest: Glass}"))
    learned, validated = (sources[case.slide_id].read(Roi(0, 0, 801, 602))[1] for case in cases)
    inside = np.zeros(learned.shape, bool)
    inside[290:320, 380:420] = True
    assert np.array_equal(validated != IGNORED, inside) and not learned[inside].any()
    beside = (learned != IGNORED) & ~inside
    assert not learned[beside].any() and beside.mean() > 0.1 and (phantom.truth[beside] == GLASS).mean() > 0.98


def test_the_users_own_manifest_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "a.svs").write_bytes(b"")
    (tmp_path / "real" / "cohort.csv").write_text("slide\na.svs\n")
    said = config(tmp_path / "link", f"cohort.manifest={tmp_path / 'real' / 'cohort.csv'}")
    with pytest.raises(CohortError, match="a file that Fullfield did not write"), open_workspace(said):
        pass
    assert (tmp_path / "real" / "cohort.csv").read_text() == "slide\na.svs\n"


@pytest.mark.parametrize("name", ["config.yaml", "cohort.csv"])
def test_a_file_of_the_users_own_in_the_output_is_not_replaced(tmp_path: Path, name: str) -> None:
    case, own = Case("a", "P1", tmp_path / "a.svs", split="train"), tmp_path / "out" / name
    write_setup(config(tmp_path / "out"), [case])
    write_setup(config(tmp_path / "out", "seed=3"), [case])  # its own it replaces
    shutil.rmtree(tmp_path / "out")
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(CohortError, match=rf"{name}: found a file that Fullfield did not write"):
        write_setup(config(tmp_path / "out"), [case])
    assert own.read_text() == "mine" and len(list(own.parent.iterdir())) == 1


def test_a_manifest_does_not_lie_where_results_will(tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_text("slide\n")
    with pytest.raises(CohortError, match=r"slides\.csv: found a file that Fullfield did not write"):
        write_setup(config(tmp_path, f"cohort.manifest={tmp_path / 'slides.csv'}"), [])


def test_what_another_command_works_at_is_not_replaced_but_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    manifest = tmp_path / "slides.csv"
    manifest.write_text("slide,patient\na.svs,P1\n")
    at_work, entered = config(tmp_path / "out", f"cohort.manifest={manifest}"), threading.Event()
    cases = dealt_cases(at_work)
    others = {"training.epochs=7": "training.epochs 60; expected one with training.epochs 7"}
    others["cohort.fractions={train: 0, val: 1, test: 0}"] = "cohort [0-9a-f]{8}; expected one with cohort"

    def wait() -> None:
        with alone(config(tmp_path / "out", f"cohort.manifest={manifest}", "cluster.workers=3"), cases):
            entered.set()

    second = threading.Thread(target=wait)
    with alone(at_work, cases):
        write_setup(at_work, cases)
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        for override, told in others.items():
            other = config(tmp_path / "out", f"cohort.manifest={manifest}", override)
            with pytest.raises(CheckpointError, match=f"another command at work with {told}"), open_workspace(other):
                pass
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        second.start()
        assert not entered.wait(0.1)
    second.join()
    assert entered.is_set()
    assert "".join(capsys.readouterr().out.split()) == f"Waitingforanothercommandin{tmp_path / 'out'}"


def test_what_a_command_that_was_waited_for_has_left_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    (tmp_path / "slides.csv").write_text("slide,patient\na.svs,P1\n")
    ours = config(tmp_path / "out", f"cohort.manifest={tmp_path / 'slides.csv'}")

    def begin() -> None:
        with open_workspace(ours):
            pass

    with ThreadPoolExecutor(1) as pool:
        with alone(ours, dealt_cases(ours)):
            write_setup(ours, dealt_cases(ours))
            begun = pool.submit(begin)
            with pytest.raises(TimeoutError):
                begun.result(0.3)
            (tmp_path / "out" / "folds.csv").touch()
        with pytest.raises(CheckpointError, match="the results of `fullfield crossval`"):
            begun.result(60)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tiles.patch_size=65", "found `tiles.patch_size`: 65; expected a multiple of 4.*`tiles.patch_size` to 64"),
        ("network.encoder=resnet18", "found `network.encoder`: .*; expected null for fcn. Leave `network.encoder` out"),
        ("network.upsample=nearest", None),
    ],
)
def test_a_network_that_cannot_be_built_is_told_by_file_and_key(tmp_path: Path, override: str, told: str | None) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config(tmp_path / "out").to_yaml())
    if told is None:
        assert read_config(path, [override]).network.upsample == "nearest"
        return
    with pytest.raises(ConfigError, match=f"^{path} with {override}: {told}"):
        read_config(path, [override])


def test_a_folder_is_no_configuration_but_may_hold_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found a folder; expected a configuration"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=f"Name {tmp_path}/config.yaml"):
        read_config(tmp_path)


def test_the_name_of_a_folder_becomes_an_alias_that_mlflow_takes() -> None:
    named = {"plain-fold-1": "plain-fold-1", "sweep-width=0.5,a": "sweep-width-0-5-a", "v2": "run-v2", "2024": "run-2024"}
    assert {name: alias_of(name) for name in named} == named
    for name in (*named, "latest", "", "ä" * 300):
        check_alias(alias_of(name))
        assert len(alias_of(name)) <= 255


def test_slides_without_cells_are_not_learned_from(tmp_path: Path) -> None:
    cases = tuple(Case(name, name, tmp_path / name, tmp_path / "truth", "val") for name in "ab")
    parquet.write_table(pa.table({"slide_id": ["b", "b"]}), tmp_path / "tiles.parquet")
    workspace = Workspace(config(tmp_path), cases, Here(), None)
    assert [case.slide_id for case in workspace.tiled(("val",))] == ["b"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration whose output has its model."""
    own = config(tmp_path_factory.mktemp("trained"))
    spec = model_spec(own)
    checkpoint.save(own.output / "model", spec, build_network(spec), {"inputs": training_inputs(own, ())})
    write_setup(own, ())
    return own


@pytest.mark.parametrize(
    "override",
    [
        "classes.0.color='#fffffe'",
        "classes.1.name=Acini",
        "annotations.rest=Glass",
        "tissue.mpp=4.0",
        "tiles.min_tissue=0.5",
        "normalisation.method=macenko",
        "network.mpp=1.0",
        "training.epochs=3",
        "training.augmentation.flips=false",
        "seed=1",
    ],
)
def test_a_model_of_another_training_is_not_taken_for_this_one(trained: Config, override: str) -> None:
    name = re.match(r"(classes|\w+\.\w+|\w+)", override)[0]
    with pytest.raises(CheckpointError) as caught:
        check_output(config(trained.output, override), ())
    found = re.search(r"a model that was trained with (.*); expected none, or one with (.*)\. Choose", str(caught.value))
    assert found is not None
    there, here = found.groups()
    assert there.startswith(f"{name} ") and here.startswith(f"{name} ") and there != here


def test_a_model_of_another_cohort_is_not_taken_for_one_of_this(trained: Config, tmp_path: Path) -> None:
    (tmp_path / "truth.geojson").write_text("[]")
    (tmp_path / "slide.tiff").touch()
    case = Case("a", "P", tmp_path / "slide.tiff", tmp_path / "truth.geojson", "train")
    with pytest.raises(
        CheckpointError,
        match="trained with another cohort, or settings that can no longer be told",
    ):
        check_output(config(trained.output), (case,))


@pytest.mark.parametrize(
    "override",
    [
        "cohort.manifest=other.csv",
        "training.devices=2",
        "segmentation.min_region_um2=3.0",
        "engine.flips=true",
        "evaluation.bootstrap_samples=9",
        "cluster.workers=0",
        "tracking.alias=mine",
    ],
)
def test_a_model_stays_where_its_training_would_be_the_same(trained: Config, override: str) -> None:
    check_output(config(trained.output, override), ())


@pytest.mark.parametrize("damage", ["weights", "folder", "file"])
def test_a_damaged_model_of_one_s_own_is_put_right_or_trained_anew(trained: Config, tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    if damage == "file":
        model.touch()
    elif damage == "folder":
        model.mkdir()
    else:
        shutil.copytree(trained.output / "model", model)
        os.truncate(model / "weights.safetensors", 3000)
    with pytest.raises(CheckpointError, match=rf"^{model}.*Put its files back .* or delete the folders `model` and"):
        check_output(config(tmp_path), ())


def test_a_file_where_a_model_will_be_trained_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "model.partial").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'model.partial'}: found other files; .* Move them away"):
        check_output(config(tmp_path), ())
