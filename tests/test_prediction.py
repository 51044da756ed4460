"""How a slide is compared with one forward pass, and how reading ahead ends; test_properties.py has tiled equals whole."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.engine import TorchEngine
from pipeline.exactness import TOLERANCE, compare, comparisons
from pipeline.footprint import with_footprint
from pipeline.geometry import Lattice, Mpp
from pipeline.grid import Grid
from pipeline.network import ModelSpec
from pipeline.phantom import render, write_slide
from pipeline.prediction import predict
from pipeline.slide import open_slide
from pipeline.stitching import stitching
from pipeline.tissue import Tissue

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))


def engine(architecture: str, depth: int) -> TorchEngine:
    """A network with random weights, whose batch norms have seen some noise."""
    spec = ModelSpec(architecture=architecture, classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=depth)
    torch.manual_seed(1)
    network = build_network(spec)
    with torch.no_grad():
        for _ in range(8):
            network.train()(torch.randn(4, 3, 64, 96))
    return TorchEngine(with_footprint(spec, network.eval()), network)


def test_a_large_slide_is_compared_in_windows_over_tile_corners(tmp_path: Path) -> None:
    image = np.tile(render(4, 401, 303, 2.0, spread=3)[0], (8, 7, 1))
    write_slide(image, tmp_path / "large.tiff", 0.5)
    slide, model = open_slide(tmp_path / "large.tiff"), engine("fcn", 2)
    tissue = Tissue(np.ones((76, 88), bool), Lattice(88, 76, Mpp.square(16)))
    found = list(comparisons(slide, tissue, slide.base, model, stitching(model.spec, blended=False)))
    assert len(found) == 3
    assert all(item.exact and item.pixels > 1024**2 for item in found)
    assert found[0].window.x == found[0].window.y == 0
    assert (found[1].window.right, found[1].window.bottom) == (slide.base.width, slide.base.height)


class Level:
    """Two classes that are level but for `sway`, which depends on the size of the window, as rounding may."""

    def __init__(self, sway: float) -> None:
        self.spec = ModelSpec(
            architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2, stride=4, halo=16
        )
        self.sway = sway

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        _, height, width, _ = windows.shape
        answer = np.full((1, 3, height, width), 0.4, np.float32)
        answer[:, 2] = 0.2
        answer[:, 0] += self.sway * (1 if width > 200 else -1)
        return answer


@pytest.mark.parametrize(("sway", "exact"), [(0.4 * TOLERANCE, True), (5 * TOLERANCE, False)])
def test_labels_of_classes_that_are_level_may_differ_and_are_told(tmp_path: Path, sway: float, exact: bool) -> None:
    write_slide(render(9, 401, 303, 2.0, spread=3)[0], tmp_path / "slide.tiff", 0.5)
    slide, model = open_slide(tmp_path / "slide.tiff"), Level(sway)
    grid = Grid(slide.base, 64, model.spec.halo, model.spec.stride)
    found = compare(slide, grid, slide.base.roi, model, stitching(model.spec, blended=False))
    assert found.difference == pytest.approx(2 * sway, rel=0.1)
    assert found.exact == exact and found.label_changes == found.pixels


def test_an_early_stop_leaves_no_reader(tmp_path: Path) -> None:
    write_slide(render(9, 401, 303, 2.0, spread=3)[0], tmp_path / "slide.tiff", 0.5)
    slide, model = open_slide(tmp_path / "slide.tiff"), engine("fcn", 2)
    answers = predict(slide, grid := Grid(slide.base, 64, model.spec.halo, model.spec.stride), grid, model)
    next(answers)
    answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
