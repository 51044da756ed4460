"""Tiled equals whole, for every architecture; what is not local is refused, and the layers at fault are named."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from torch import nn

from pipeline.classes import Class, Classes
from pipeline.footprint import Footprint, with_footprint
from pipeline.network import ModelSpec, activation, build_network

CLASSES = Classes((Class("Gland", (200, 40, 40)), Class("Stroma", (40, 200, 40)), Class("Fat", (240, 240, 80))))


def spec(architecture: str, **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"classes": CLASSES, "mpp": 1.0, "patch_size": 64, "width": 8, "depth": 3}
    return ModelSpec(architecture=architecture, **{**values, **changes})


def resnet(encoder: str, **changes: Any) -> ModelSpec:
    return spec("flexible_unet", depth=5, encoder=encoder, **changes)


# Each with its halo, stride and output stride. Those of the fcn follow by hand, from the widest path: 1 or 2 convolutions of
# 1, 2, 4 px down, one of 8 at the bottom, and 4, 2, 1 px up.
KNOWN = {
    "fcn": (spec("fcn"), Footprint(32, 8, 1)),
    "fcn strided": (spec("fcn", downsample="stride", upsample="transpose"), Footprint(24, 8, 1)),
    "fcn shallow": (spec("fcn", depth=1), Footprint(6, 2, 1)),
    "heatmap": (spec("heatmap"), Footprint(24, 8, 8)),
    "heatmap strided": (spec("heatmap", downsample="stride"), Footprint(16, 8, 8)),
    "unet": (spec("unet", depth=4), Footprint(96, 16, 1)),
    "basic_unet": (spec("basic_unet", depth=4), Footprint(96, 16, 1)),
    "resnet18": (resnet("resnet18"), Footprint(288, 32, 1)),
    "resnet34": (resnet("resnet34", upsample="transpose"), Footprint(544, 32, 1)),
    "resnet50": (resnet("resnet50"), Footprint(288, 32, 1)),
}
LIGHT = [name for name in KNOWN if not name.startswith("resnet")]


@dataclass
class Trial:
    """A network with lively batch statistics, an image, and the answer of one forward pass over all of it."""

    spec: ModelSpec
    network: nn.Module
    image: torch.Tensor
    whole: torch.Tensor

    def tile(self, top: int, left: int, size: int, halo: int) -> tuple[tuple[slice, slice], torch.Tensor]:
        """The rows and columns of the answer that a tile of `size` px writes, and what it writes there."""
        bottom, right = min(top + size, self.image.shape[2]), min(left + size, self.image.shape[3])
        y, x, scale = max(top - halo, 0), max(left - halo, 0), self.spec.output_stride
        with torch.inference_mode():
            found = activation(self.network(self.image[:, :, y : bottom + halo, x : right + halo]))
        crop = found[:, :, (top - y) // scale :, (left - x) // scale :]
        rows, columns = slice(top // scale, bottom // scale), slice(left // scale, right // scale)
        return (rows, columns), crop[:, :, : rows.stop - rows.start, : columns.stop - columns.start]

    def tiled(self, halo: int) -> torch.Tensor:
        """The answer put together from tiles of 5 strides, an odd number, so that origins are no multiples of two strides."""
        answer, size = torch.full_like(self.whole, torch.nan), 5 * self.spec.stride
        for top in range(0, self.image.shape[2], size):
            for left in range(0, self.image.shape[3], size):
                (rows, columns), found = self.tile(top, left, size, halo)
                answer[:, :, rows, columns] = found
        return answer


def picture(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Noise of every scale, so that the deepest layers have something to see: (count, 3, height, width) float32."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(count, 3, height, width))
    for factor in (8, 32):
        coarse = rng.normal(size=(count, 3, -(-height // factor) + 1, -(-width // factor) + 1))
        image += 2 * zoom(coarse, (1, 1, factor, factor), order=1)[:, :, :height, :width]
    return torch.from_numpy((image / image.std()).astype(np.float32))


@cache
def trial(name: str) -> Trial:
    torch.manual_seed(0)
    network = build_network(KNOWN[name][0])
    for step in range(12):  # so that the running statistics are those of pictures, not those of an unused layer
        network.train()(picture(2, 64, 96, step))
    model = with_footprint(KNOWN[name][0], network.eval())
    stride, halo = model.stride, model.halo
    height, width = 2 * halo + 11 * stride, (halo + 11 * stride if name in LIGHT else 2 * stride)
    image = picture(1, height, width, 99)
    with torch.inference_mode():
        return Trial(model, network, image, activation(network(image)))


@pytest.mark.parametrize("name", KNOWN)
def test_halo_and_stride_are_those_known(name: str) -> None:
    model = trial(name).spec
    assert Footprint(model.halo, model.stride, model.output_stride) == KNOWN[name][1]


@pytest.mark.parametrize("name", KNOWN)
def test_tiles_give_what_one_forward_pass_gives(name: str) -> None:
    case = trial(name)
    tiled = case.tiled(case.spec.halo)
    assert (tiled - case.whole).abs().max() < 1e-5
    assert torch.equal(tiled.argmax(dim=1), case.whole.argmax(dim=1))
    assert case.whole.std(dim=(2, 3)).min() > 1e-3  # an answer that could be wrong


@pytest.mark.parametrize("name", KNOWN)
def test_tiles_off_the_stride_are_wrong(name: str) -> None:
    case = trial(name)
    stride, halo = case.spec.stride, case.spec.halo
    for offset, exact in ((0, True), (stride, True), (stride // 2, False)):
        place, found = case.tile(halo + offset, 0, 2 * stride, halo)
        difference = (found - case.whole[:, :, *place]).abs().max()
        assert difference < 1e-5 if exact else difference > 1e-3


@pytest.mark.parametrize("name", KNOWN)
def test_one_stride_less_of_halo_is_too_little(name: str) -> None:
    case = trial(name)
    assert (case.tiled(case.spec.halo - case.spec.stride) - case.whole).abs().max() > 1e-5


@pytest.mark.parametrize("name", LIGHT)
def test_nothing_beyond_the_halo_matters(name: str) -> None:
    case = trial(name)
    start = case.spec.halo + 4 * case.spec.stride
    stop, scale = start + 3 * case.spec.stride, case.spec.output_stride
    changed = case.image.clone()
    changed[:, :, : start - case.spec.halo] = 1e3
    changed[:, :, stop + case.spec.halo :] = -1e3
    with torch.inference_mode():
        found = activation(case.network(changed))
    difference = (found - case.whole)[:, :, start // scale : stop // scale].abs().max()
    assert difference < 1e-5
    assert (found - case.whole).abs().max() > 0.1
