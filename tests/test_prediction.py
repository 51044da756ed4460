"""Tiled equals whole: for any size of slide and tile, at any scale, for full-size answers and heat maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.engine import TorchEngine
from pipeline.exactness import TOLERANCE, comparisons
from pipeline.footprint import with_footprint
from pipeline.geometry import Lattice, Mpp
from pipeline.grid import Grid
from pipeline.network import ModelSpec
from pipeline.phantom import render, write_slide
from pipeline.prediction import predict
from pipeline.slide import Slide, open_slide
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


ENGINES = {name: engine(*name) for name in [("fcn", 2), ("fcn", 4), ("unet", 3), ("heatmap", 3)]}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Slide]:
    """Slides of many sizes, cut from one phantom: smaller than a tile, than the halo, one pixel wide."""
    image, folder = render(9, 401, 303, 2.0, spread=3)[0], tmp_path_factory.mktemp("sizes")
    found = {}
    for width, height in [(401, 303), (97, 211), (160, 64), (31, 17), (1, 40), (130, 1)]:
        path = folder / f"{width}x{height}.tiff"
        write_slide(image[:height, :width], path, 0.5)
        found[width, height] = open_slide(path)
    return found


def whole(slide: Slide, grid: Grid, model: TorchEngine) -> np.ndarray:
    """One forward pass over the whole lattice, padded with glass to a multiple of the stride."""
    answer = model(slide.read(grid.padded.roi, grid.lattice)[None])[0]
    height, width = grid.lattice.shrink(model.spec.output_stride).shape
    return answer[:, :height, :width]


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(ENGINES)),
    size=st.sampled_from([(401, 303), (97, 211), (160, 64), (31, 17), (1, 40), (130, 1)]),
    tile=st.integers(16, 200),
    mpp=st.sampled_from([0.5, 0.73, 1.0, 1.9]),
)
def test_tiled_equals_whole(slides, name: tuple[str, int], size: tuple[int, int], tile: int, mpp: float) -> None:
    slide, model = slides[size], ENGINES[name]
    grid = Grid(slide.base.at(Mpp.square(mpp)), tile, model.spec.halo, model.spec.stride)
    reference = whole(slide, grid, model)
    tiled, written = np.full_like(reference, np.nan), np.zeros(reference.shape[1:], int)
    for cut, probabilities in predict(slide, grid, grid, model):
        rows, columns = cut.target(model.spec.output_stride).slices()
        tiled[:, rows, columns] = probabilities
        written[rows, columns] += 1
    assert (written == 1).all()
    assert np.abs(tiled - reference).max() <= TOLERANCE
    assert (tiled.argmax(0) == reference.argmax(0)).all()


def test_too_small_a_halo_is_seen(slides) -> None:
    slide, model = slides[401, 303], ENGINES["unet", 3]
    grid = Grid(slide.base, 64, model.spec.halo - model.spec.stride * 3, model.spec.stride)
    reference = whole(slide, grid, model)
    found = [
        np.abs(probabilities - reference[(slice(None), *tile.target(1).slices())]).max()
        for tile, probabilities in predict(slide, grid, grid, model)
    ]
    assert max(found) > TOLERANCE


def test_a_large_slide_is_compared_in_windows_over_tile_corners(tmp_path: Path) -> None:
    image = np.tile(render(4, 401, 303, 2.0, spread=3)[0], (8, 7, 1))
    write_slide(image, tmp_path / "large.tiff", 0.5)
    slide, model = open_slide(tmp_path / "large.tiff"), ENGINES["fcn", 2]
    tissue = Tissue(np.ones((76, 88), bool), Lattice(88, 76, Mpp.square(16)))
    found = list(comparisons(slide, tissue, slide.base, model, stitching(model.spec, blended=False)))
    assert len(found) == 3
    assert all(item.exact and item.pixels > 1024**2 for item in found)
    assert found[0].window.x == found[0].window.y == 0
    assert (found[1].window.right, found[1].window.bottom) == (slide.base.width, slide.base.height)


def test_an_early_stop_leaves_no_reader(slides) -> None:
    import threading

    slide, model = slides[401, 303], ENGINES["fcn", 2]
    answers = predict(slide, grid := Grid(slide.base, 64, model.spec.halo, model.spec.stride), grid, model)
    next(answers)
    answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
