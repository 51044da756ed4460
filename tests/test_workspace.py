import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import checkpoint
from pipeline.architectures import build_network
from pipeline.classes import IGNORED
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.config_file import parse_config
from pipeline.errors import CheckpointError
from pipeline.geometry import Roi
from pipeline.inputs import check_output, training_inputs
from pipeline.phantom import GLASS, make_phantom
from pipeline.truth import ClassMap
from pipeline.workspace import class_map, model_spec, open_sources


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration whose output has its model."""
    own = config(tmp_path_factory.mktemp("trained"))
    spec = model_spec(own)
    checkpoint.save(own.output / "model", spec, build_network(spec), {"inputs": training_inputs(own, ())})
    return own


@pytest.mark.parametrize(
    "override",
    [
        "classes.0.color='#fffffe'",
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
    with pytest.raises(CheckpointError, match="a model that was trained with another cohort or configuration"):
        check_output(config(trained.output, override), ())


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
