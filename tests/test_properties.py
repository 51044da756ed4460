"""Tiled equals whole, whatever the slide's size, the scale, the tiles, the network's stride, and the engine."""

from collections.abc import Callable
from functools import cache
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.engine import Engine, TorchEngine
from pipeline.exactness import TOLERANCE
from pipeline.footprint import with_footprint
from pipeline.geometry import Mpp, Roi
from pipeline.grid import Grid
from pipeline.network import ModelSpec, normalise
from pipeline.openvino_engine import OpenVinoEngine
from pipeline.openvino_graph import export, installed
from pipeline.phantom import render, write_slide
from pipeline.prediction import predict
from pipeline.runtime import Mirrored
from pipeline.slide import Slide, open_slide

GRAPHS = TemporaryDirectory()


def compiled(spec: ModelSpec, model: nn.Module) -> Engine:
    """The engine that compiles its graph anew for every shape of window."""
    return OpenVinoEngine(spec, export(spec, model.eval(), Path(GRAPHS.name) / f"{spec.architecture}-{id(model)}"))


def mirrored(spec: ModelSpec, model: nn.Module) -> Engine:
    """The mean over a window, its mirror images and its turns."""
    return Mirrored(TorchEngine(spec, model))


ENGINES: list[Callable[[ModelSpec, nn.Module], Engine]] = [TorchEngine, mirrored, *([compiled] if installed() else [])]
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
BASE_MPP = 0.5
TILES = 30  # at most, so that no example takes long


def described(architecture: str, depth: int, patch_size: int = 64, residual_units: int | None = None) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        classes=CLASSES,
        mpp=1.0,
        patch_size=patch_size,
        width=2 if depth > 3 else 4,
        depth=depth,
        residual_units=residual_units,
    )


# Strides from 1 to 32. The first is no architecture of ours: nothing in it halves.
SPECS = {
    "plain": described("fcn", 1),
    "fcn 1": described("fcn", 1),
    "fcn 3": described("fcn", 3),
    "fcn 5": described("fcn", 5),
    "unet 2": described("unet", 2),
    "unet 4": described("unet", 4),
    "single unet 4": described("unet", 4, residual_units=0),
    "heatmap 1": described("heatmap", 1),
    "heatmap 3": described("heatmap", 3),
    "heatmap 5": described("heatmap", 5),
    "classifier 1": described("classifier", 1, 32),
    "classifier 3": described("classifier", 3, 48),
    "classifier 5": described("classifier", 5, 160),
}
STRIDES = {"plain": 1, **{name: 2 ** int(name[-1]) for name in list(SPECS)[1:]}}
PICTURE = render(9, 1101, 1003, 2.0, spread=3)[0]

names, engines = st.sampled_from(sorted(SPECS)), st.sampled_from(ENGINES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Slide]:
    """Slides of any size, cut from one phantom."""
    folder = tmp_path_factory.mktemp("slides")

    def slide(width: int, height: int) -> Slide:
        path: Path = folder / f"{width}x{height}.tiff"
        if not path.exists():
            write_slide(PICTURE[:height, :width], path, BASE_MPP)
        return open_slide(path)

    return slide


@cache
def network(name: str) -> tuple[ModelSpec, nn.Module]:
    """A network with lively batch statistics, of which every class wins somewhere, and its measured spec."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    model = plain if name == "plain" else build_network(SPECS[name])
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        images = normalise(np.stack([PICTURE[:256, :320], PICTURE[300:556, :320]]), SPECS[name])
        model.train()(images)
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
        last = [layer for layer in layers if layer.bias is not None][-1]
        last.bias.sub_(model.eval()(images).mean(dim=(0, 2, 3)))
    return with_footprint(SPECS[name], model), model


@cache
def engine(make: Callable[[ModelSpec, nn.Module], Engine], name: str) -> Engine:
    return make(*network(name))


@st.composite
def lattices(draw: st.DrawFn) -> tuple[str, tuple[int, int], float]:
    """A network, the size of a slide on which it can show something, and a scale that no level has.

    One side has room for some tiles of which both halos lie inside. The other may be anything down to one pixel.
    """
    name = draw(names)
    spec = network(name)[0]
    mpp = draw(st.floats(0.3, 1.1))
    limit = 2 * spec.halo + 6 * spec.stride
    sides = st.one_of(st.integers(1, max(spec.stride, 2)), st.integers(1, spec.halo + 1), st.integers(1, limit))
    size = [draw(st.one_of(st.integers(limit // 2, limit), sides)), draw(sides)]
    if draw(st.booleans()):
        size.reverse()
    width, height = (max(round(side * mpp / BASE_MPP), 1) for side in size)
    return name, (min(width, PICTURE.shape[1]), min(height, PICTURE.shape[0])), mpp


def whole(slide: Slide, grid: Grid, model: Engine) -> np.ndarray:
    """One forward pass over the whole lattice, padded with glass to a multiple of the stride."""
    return model(slide.read(grid.padded.roi, grid.lattice)[None])[0]


def agree(found: np.ndarray, truth: np.ndarray) -> bool:
    """Whether (classes, h, w) probabilities are equal, and so are all labels."""
    return bool(np.abs(found - truth).max() <= TOLERANCE and (found.argmax(0) == truth.argmax(0)).all())


@pytest.mark.parametrize("name", SPECS)
def test_the_networks_have_the_strides_that_they_are_for_and_every_class_wins(name: str) -> None:
    spec, _ = network(name)
    assert spec.stride == STRIDES[name]
    assert spec.output_stride == (spec.stride if name.startswith(("heatmap", "classifier")) else 1)
    labels = engine(TorchEngine, name)(PICTURE[None, :320, :448])[0].argmax(0)
    assert np.bincount(labels.ravel(), minlength=3).min() > 0.01 * labels.size


@settings(max_examples=120)
@given(make=engines, case=lattices(), tile_size=st.integers(1, 400))
def test_tiles_are_what_one_pass_gives_and_write_each_pixel_once(slides, make, case, tile_size: int) -> None:
    name, size, mpp = case
    slide, model = slides(*size), engine(make, name)
    lattice = slide.base.at(Mpp.square(mpp))
    grid = Grid(lattice, max(tile_size, isqrt(lattice.roi.area // TILES)), model.spec.halo, model.spec.stride)
    cells = lattice.shrink(model.spec.output_stride)
    tiled, written = np.full((len(CLASSES), *cells.shape), np.nan, np.float32), np.zeros(cells.shape, int)
    for tile, probabilities in predict(slide, grid, grid, model):
        place = tile.target(model.spec.output_stride).slices()
        tiled[:, *place] = probabilities
        written[place] += 1
    assert (written == 1).all()
    assert agree(tiled, whole(slide, grid, model)[:, : cells.height, : cells.width])


@settings(max_examples=60)
@given(make=engines, case=lattices(), data=st.data())
def test_a_window_may_start_at_any_stride(slides, make, case, data: st.DataObject) -> None:
    name, size, mpp = case
    slide, model = slides(*size), engine(make, name)
    spec = model.spec
    grid = Grid(slide.base.at(Mpp.square(mpp)), 1, spec.halo, spec.stride)
    rows, columns = grid.shape
    left, top = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    right, bottom = data.draw(st.integers(left + 1, columns)), data.draw(st.integers(top + 1, rows))
    write = Roi(*(value * spec.stride for value in (left, top, right - left, bottom - top)))
    read = write.grow(spec.halo).intersect(grid.padded.roi)
    answer = model(slide.read(read, grid.lattice)[None])[0]
    scale = spec.output_stride
    crop = write.shrink(scale).within(read.shrink(scale)).slices()
    assert agree(answer[:, *crop], whole(slide, grid, model)[:, *write.shrink(scale).slices()])


@settings(max_examples=60)
@given(make=engines, name=names, batch=st.integers(1, 5), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_windows_of_a_batch_do_not_know_of_each_other(make, name: str, batch: int, rows: int, columns: int) -> None:
    model = engine(make, name)
    height, width = rows * model.spec.stride, columns * model.spec.stride
    windows = np.stack([PICTURE[97 * index :, 61 * index :][:height, :width] for index in range(batch)])
    for window, answer in zip(windows, model(windows), strict=True):
        assert agree(answer, model(window[None])[0])


@pytest.mark.parametrize("name", SPECS)
def test_a_halo_that_lacks_one_stride_is_seen(slides, name: str) -> None:
    model = engine(TorchEngine, name)
    halo, stride, scale = model.spec.halo, model.spec.stride, model.spec.output_stride
    slide = slides(2 * halo + 9 * stride, 2 * halo + 5 * stride)
    grid = Grid(slide.base, 2 * stride, halo - stride, stride)
    rows, columns = grid.shape
    (tile, found), *_ = predict(slide, grid, [grid[rows // 2, columns // 2]], model)
    truth = whole(slide, grid, model)[:, *tile.target(scale).slices()]
    assert np.abs(found - truth).max() > TOLERANCE


def test_a_row_of_pixels_is_mirrored_too() -> None:
    """Numpy takes a mirrored axis of one pixel for contiguous as it is, and torch takes no such array."""
    row, model, plain = PICTURE[None, :1, :9], engine(mirrored, "plain"), engine(TorchEngine, "plain")
    column = row.swapaxes(1, 2).copy()
    along = (plain(row) + plain(row[:, :, ::-1].copy())[..., ::-1]) / 2
    across = (plain(column) + plain(column[:, ::-1].copy())[:, :, ::-1]) / 2
    assert agree(model(row)[0], ((along + across.swapaxes(2, 3)) / 2)[0])
