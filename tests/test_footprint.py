"""Tiled equals whole, for every architecture; what is not local is refused, and the layers at fault are named."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks import nets
from scipy.ndimage import zoom
from torch import nn

from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.errors import NetworkError
from pipeline.footprint import Footprint, assert_exact, measure, with_footprint
from pipeline.network import ModelSpec, activation

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


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Trial:
    """A network with lively batch statistics, an image, and the answer of one forward pass over all of it."""

    spec: ModelSpec
    network: nn.Module
    image: torch.Tensor
    bias: torch.Tensor | float = 0.0

    def answer(self, image: torch.Tensor) -> torch.Tensor:
        """Probabilities; the bias sees to it that every class wins somewhere."""
        with torch.inference_mode():
            return activation(self.network(image) - self.bias)

    @cached_property
    def whole(self) -> torch.Tensor:
        return self.answer(self.image)

    def tile(self, top: int, left: int, size: int, halo: int) -> tuple[tuple[slice, slice], torch.Tensor]:
        """The rows and columns of the answer that a tile of `size` px writes, and what it writes there."""
        bottom, right = min(top + size, self.image.shape[2]), min(left + size, self.image.shape[3])
        y, x, scale = max(top - halo, 0), max(left - halo, 0), self.spec.output_stride
        found = self.answer(self.image[:, :, y : bottom + halo, x : right + halo])
        crop = found[:, :, (top - y) // scale :, (left - x) // scale :]
        rows, columns = slice(top // scale, bottom // scale), slice(left // scale, right // scale)
        return (rows, columns), crop[:, :, : rows.stop - rows.start, : columns.stop - columns.start]

    def tiled(self, halo: int, strides: int) -> torch.Tensor:
        """The answer put together from tiles of so many strides."""
        answer, size = torch.full_like(self.whole, torch.nan), strides * self.spec.stride
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
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the plain mean over all steps, so that three are enough
    with torch.no_grad():
        for step in range(3):
            network.train()(picture(4, 64, 96, step))
    model = with_footprint(KNOWN[name][0], network.eval())
    stride, halo = model.stride, model.halo
    height, width = 2 * halo + 11 * stride, (halo + 11 * stride if name in LIGHT else 2 * stride)
    image = picture(1, height, width, 99)
    with torch.inference_mode():
        bias = network(image).mean(dim=(0, 2, 3), keepdim=True)
    return Trial(model, network, image, bias)


@pytest.mark.parametrize("name", KNOWN)
def test_halo_and_stride_are_those_known(name: str) -> None:
    model = trial(name).spec
    assert Footprint(model.halo, model.stride, model.output_stride) == KNOWN[name][1]


@pytest.mark.parametrize("name", KNOWN)
def test_tiles_give_what_one_forward_pass_gives(name: str) -> None:
    case = trial(name)
    strides = 5 if name in LIGHT else 13  # odd, so that origins are no multiples of two strides
    tiled, labels = case.tiled(case.spec.halo, strides), case.whole.argmax(dim=1)
    assert (tiled - case.whole).abs().max() < 1e-5
    assert torch.equal(tiled.argmax(dim=1), labels)
    assert torch.bincount(labels.flatten()).min() > 0.01 * labels.numel()  # an answer that could be wrong


@pytest.mark.parametrize("name", KNOWN)
def test_tiles_off_the_stride_are_wrong(name: str) -> None:
    case = trial(name)
    stride, halo = case.spec.stride, case.spec.halo
    for offset, exact in ((stride, True), (stride // 2, False)):
        place, found = case.tile(halo + offset, 0, 2 * stride, halo)
        difference = (found - case.whole[:, :, *place]).abs().max()
        assert difference < 1e-5 if exact else difference > 1e-3


@pytest.mark.parametrize("name", LIGHT)
def test_one_stride_less_of_halo_is_too_little(name: str) -> None:
    case = trial(name)
    assert (case.tiled(case.spec.halo - case.spec.stride, strides=5) - case.whole).abs().max() > 1e-4


@pytest.mark.parametrize("name", KNOWN)
def test_the_last_stride_within_the_halo_matters_and_nothing_beyond(name: str) -> None:
    case = trial(name)
    stride, halo, scale = case.spec.stride, case.spec.halo, case.spec.output_stride
    start, stop = halo + 2 * stride, halo + 5 * stride
    write, felt = slice(start // scale, stop // scale), 1e-4 if name in LIGHT else 0.0
    for kept, least, most in ((halo, 0.0, 1e-5), (halo - stride, felt, 1.0)):
        changed = case.image.clone()
        # The far end of a footprint is weak (below rounding in a ResNet), but such bright pixels are felt there.
        changed[:, :, : start - kept] *= 1e3
        changed[:, :, stop + kept :] *= 1e3
        difference = (case.answer(changed) - case.whole)[:, :, write].abs().max()
        assert least <= difference < most


@pytest.mark.parametrize(
    ("layers", "known"),
    [
        ([nn.Conv2d(3, 2, 1)], Footprint(0, 1, 1)),
        ([nn.Conv2d(3, 2, 3, padding=5, dilation=5)], Footprint(5, 1, 1)),
        ([nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 5, padding=2)], Footprint(3, 1, 1)),
        ([nn.ZeroPad2d((0, 0, 7, 0)), nn.Conv2d(3, 2, (8, 1))], Footprint(7, 1, 1)),  # looks upward only
        ([nn.ZeroPad2d((0, 6, 0, 0)), nn.Conv2d(3, 2, (1, 7))], Footprint(6, 1, 1)),  # looks to the right only
        ([nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, padding=1), nn.Upsample(scale_factor=2)], Footprint(2, 2, 1)),
        ([nn.ZeroPad2d((1, -1, 3, -3)), nn.Conv2d(3, 2, 1)], Footprint(3, 1, 1)),  # looks up and to the left at once
        ([nn.MaxPool2d((4, 1)), nn.Conv2d(3, 2, 1), nn.Upsample(scale_factor=(4, 1))], Footprint(0, 4, 1)),
        ([nn.MaxPool2d((1, 4)), nn.Conv2d(3, 2, 1), nn.Upsample(scale_factor=(1, 4))], Footprint(0, 4, 1)),
        ([nn.AvgPool2d(4), nn.Conv2d(3, 2, 1)], Footprint(0, 4, 4)),
        ([nn.Conv2d(3, 2, 4, stride=4), nn.PixelShuffle(1), nn.Upsample(scale_factor=2)], Footprint(0, 4, 2)),
    ],
)
def test_footprints_that_follow_by_hand(layers: list[nn.Module], known: Footprint) -> None:
    network = nn.Sequential(*layers)
    assert measure(network) == known
    assert_exact(network, known)


def test_the_class_that_looks_farthest_counts() -> None:
    class Apart(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 1, size, padding="same") for size in sizes)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer(image) for layer in self.layers], dim=1)

    assert measure(Apart(1, 5)) == measure(Apart(5, 1)) == Footprint(2, 1, 1)


def test_weights_that_are_zero_do_not_hide_what_a_network_may_look_at() -> None:
    network = build_network(spec("fcn"))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    assert measure(network) == KNOWN["fcn"][1]


class AddsItsMean(nn.Conv2d):
    """Adds the mean of the whole image to one class, and hides NaN."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer = super().forward(image)
        return torch.cat([answer[:, :1] + answer.nan_to_num().mean(dim=(2, 3), keepdim=True), answer[:, 1:]], dim=1)


class Counts(nn.Conv2d):
    """Adds something to one class in the first row (2) or column (3) of every period."""

    def __init__(self, dim: int, period: int, added: float = 1.0, size: int = 3) -> None:
        super().__init__(3, 2, size, padding="same")
        self.dim, self.period, self.added = dim, period, added

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer = super().forward(image)
        lines = self.added * (torch.arange(answer.shape[self.dim]) % self.period == 0)
        return torch.cat([answer[:, :1] + (lines[:, None] if self.dim == 2 else lines), answer[:, 1:]], dim=1)


class BeginsWithItsLength(nn.Conv2d):
    """Adds to the first row of one class what depends on how many rows there are."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer = super().forward(image)
        return torch.cat([answer[:, :1, :1] + image.shape[2] / 100, answer[:, :1, 1:]], dim=2)


class SumsUp(nn.Conv2d):
    """Adds up the rows (2) or columns (3), so that each knows all before it."""

    def __init__(self, dim: int) -> None:
        super().__init__(3, 2, 1)
        self.dim = dim

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image).cumsum(self.dim)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "UNet": (
        lambda: nets.UNet(2, 3, 2, (8, 16, 32), (2, 2), num_res_units=2),
        ("model.0.conv.unit0.adn.N (InstanceNorm2d)", "and 3 more"),
    ),
    "BasicUNet": (
        lambda: nets.BasicUNet(2, 3, 2, (8, 8, 8, 8, 8, 8)),
        ("conv_0.conv_0.adn.N (InstanceNorm2d)", "and 12 more"),
    ),
    "SegResNet": (
        lambda: nets.SegResNet(spatial_dims=2, init_filters=8, in_channels=3, out_channels=2),
        ("down_layers.0.1.norm1 (GroupNorm)", "and 19 more"),
    ),
    "AttentionUnet": (
        lambda: nets.AttentionUnet(2, 3, 2, (8, 16, 32), (2, 2)),
        ("model.1.submodule.1.merge.adn.N (InstanceNorm2d), model.1.merge.adn.N (InstanceNorm2d);",),
    ),
    "DynUNet": (
        lambda: nets.DynUNet(2, 3, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(8, 16, 32)),
        ("input_block.norm1 (InstanceNorm2d)", "and 4 more"),
    ),
    "efficientnet": (
        lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0", pretrained=False),
        ("encoder._blocks.0.0._se_adaptpool (AdaptiveAvgPool2d)", "and 10 more"),
    ),
    "sum of rows": (lambda: SumsUp(2), ("mix pixels from all over the image: the network (SumsUp)",)),
    "sum of columns": (lambda: SumsUp(3), ("mix pixels from all over the image: the network (SumsUp)",)),
    "unpadded": (lambda: nn.Conv2d(3, 2, 3), ("254 x 62 for 256 x 64",)),
    "dense": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), ("no answer for an image of",)),
    "stride 3": (lambda: nn.Sequential(nn.MaxPool2d(3), nn.Conv2d(3, 2, 1)), ("no power of two",)),
    "not finite": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.Threshold(9e9, torch.inf)), ("not finite",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_local_is_refused_by_name(name: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(NetworkError) as caught:
        measure(build())
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nets.BasicUNet(2, 3, 2, (8, 8, 8, 8, 8, 8), norm="batch", upsample="nontrainable"),  # corners aligned
        lambda: AddsItsMean(3, 2, 3, padding=1),
        lambda: Counts(2, 8),
        lambda: Counts(3, 8),
        lambda: Counts(2, 2),
        lambda: Counts(3, 2, size=5),
        lambda: Counts(2, 8, added=4e-4),
        lambda: BeginsWithItsLength(3, 2, 3, padding=1),
    ],
    ids=[
        "scales by the image's size",
        "hides NaN",
        "rows",
        "columns",
        "odd rows",
        "odd columns",
        "by little",
        "at its start",
    ],
)
def test_what_nan_does_not_show_the_cross_check_finds(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = build()
    with pytest.raises(NetworkError, match="differ from one forward pass"):
        assert_exact(network, measure(network))
    with pytest.raises(NetworkError, match="differ from one forward pass"):
        with_footprint(spec("fcn"), network)


@pytest.mark.parametrize("wrong", [Footprint(24, 8, 1), Footprint(32, 4, 1), Footprint(0, 8, 1)], ids=str)
def test_the_cross_check_finds_a_wrong_footprint(wrong: Footprint) -> None:
    with pytest.raises(NetworkError, match=r"differ from one forward pass|no answer"):
        assert_exact(trial("fcn").network, wrong)


def test_an_answer_of_nan_is_not_exact() -> None:
    network = nn.Conv2d(3, 2, 1)
    nn.init.constant_(network.weight, torch.nan)
    with pytest.raises(NetworkError, match="by nan in probability"):
        assert_exact(network, Footprint(0, 1, 1))


def test_measuring_leaves_everything_as_it_was() -> None:
    torch.manual_seed(3)
    network = build_network(spec("fcn")).train()
    frozen = next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random, momenta = torch.get_rng_state(), {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    with_footprint(spec("fcn"), network)
    assert torch.equal(random, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [layer for layer in network.modules() if not layer.training] == [frozen]
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == momenta
    assert not any(layer._forward_hooks for layer in network.modules())
