"""`fullfield plan`, as a user calls it, against what `fullfield segment` then does."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.architectures import build_network
from pipeline.checkpoint import save
from pipeline.classes import Class, Classes
from pipeline.footprint import with_footprint
from pipeline.network import ModelSpec
from pipeline.phantom import render, write_slide
from pipeline.tiling import Estimate

ROOT = Path(__file__).parents[1]
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))


def fullfield(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "workflows", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide, a third of it glass, and a small model with random weights."""
    folder = tmp_path_factory.mktemp("plan")
    write_slide(render(3, 2301, 1507, 1.0, spread=0.6)[0], folder / "slide.tiff", 1.0)
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2)
    torch.manual_seed(3)
    network = build_network(spec).eval()
    save(folder / "model", with_footprint(spec, network), network)
    return folder


def test_a_plan_is_what_segmenting_then_does(project: Path) -> None:
    slide, model, output = project / "slide.tiff", project / "model", project / "out"
    before = set(project.rglob("*"))
    found = json.loads(fullfield("plan", slide, "--model", model, "--json"))
    assert set(project.rglob("*")) == before
    assert set(found) == {"slide", "model", "remark", *Estimate.__dataclass_fields__} and found["remark"] is None
    assert 0 < found["tissue_tiles"] <= found["tiles"]
    command = ("segment", slide, "--model", model, "--output", output)
    said = f"Tiles of {found['tile_size']} px"
    assert said in fullfield(*command)
    folder = output / "slides" / "slide"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["tiles"] == found["tissue_tiles"]
    with (output / "slides.csv").open() as file:
        assert float(next(csv.DictReader(file))["megapixels"]) == pytest.approx(found["pixels"] / 1e6, abs=0.01)
    arrays = folder / "segmentation.ome.zarr"
    written = sum(path.stat().st_size for path in arrays.rglob("c/**/*") if path.is_file())
    assert 0.4 < found["output_bytes"] / written < 2.5
    # Segmenting again, with no size given, goes on with the size that is there.
    assert said in fullfield(*command)


def test_the_user_s_tile_size_counts(project: Path) -> None:
    found = fullfield("plan", project / "slide.tiff", "--model", project / "model", "--tile-size", 301)
    assert "304 px" in found
    assert "of 40" in found
    assert "GiB" in found


def test_a_slide_that_is_none_is_one_line(project: Path) -> None:
    log = fullfield("plan", project / "none.tiff", "--model", project / "model", code=1)
    assert "none.tiff" in log
    assert "Traceback" not in log
