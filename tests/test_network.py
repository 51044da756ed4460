"""Networks whose sizes are known layer by layer, and specs that survive YAML."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pipeline.architectures import build_network, seeded_learner
from pipeline.classes import Class, Classes
from pipeline.errors import NetworkError
from pipeline.network import ModelSpec, activation, normalise
from pipeline.staining import Normalisation

CLASSES = Classes((Class("Gland", (200, 40, 40)), Class("Stroma", (40, 200, 40)), Class("Fat", (240, 240, 80))))
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.Upsample)
SIZES = [(64, 64), (128, 128), (64, 192)]


def spec(architecture: str = "fcn", **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"classes": CLASSES, "mpp": 1.0, "patch_size": 64, "width": 4, "depth": 3}
    return ModelSpec(architecture=architecture, **{**values, **changes})


ALL = [
    spec("fcn"),
    spec("fcn", downsample="stride", upsample="transpose"),
    spec("heatmap"),
    spec("heatmap", downsample="stride"),
    spec("unet"),
    spec("unet", residual_units=0),
    spec("basic_unet", depth=4),
    spec("flexible_unet", depth=5, encoder="resnet10"),
    spec("flexible_unet", depth=5, encoder="resnet18", upsample="transpose"),
]
CHOICES = ("architecture", "downsample", "upsample", "encoder", "residual_units")
NAMES = ["-".join(str(getattr(s, key)) for key in CHOICES if getattr(s, key) is not None) for s in ALL]


def layer_sizes(network: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
    """(rows, columns) after each convolution, pooling and upsampling, in the order of their work."""
    sizes: list[tuple[int, int]] = []
    layers = [layer for layer in network.modules() if isinstance(layer, LAYERS)]
    handles = [layer.register_forward_hook(lambda *hook: sizes.append(tuple(hook[2].shape[2:]))) for layer in layers]
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, height, width))
    for handle in handles:
        handle.remove()
    return sizes


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(
    ("model", "divisors"),
    [
        # two convolutions a level, a pooling and one at the bottom; then 1x1, upsampling and a convolution a level; the head
        (ALL[0], [1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]),
        (ALL[1], [1, 1, 2, 2, 4, 4, 8, 4, 4, 2, 2, 1, 1, 1]),
        (ALL[2], [1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8]),
        (ALL[3], [1, 1, 2, 2, 4, 4, 8, 8, 8]),
    ],
    ids=NAMES[:4],
)
def test_sizes_at_each_layer(model: ModelSpec, divisors: list[int], height: int, width: int) -> None:
    assert layer_sizes(build_network(model), height, width) == [(height // d, width // d) for d in divisors]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("model", ALL[4:], ids=NAMES[4:])
def test_monai_networks_halve_as_often_as_the_depth_says_and_come_back(model: ModelSpec, height: int, width: int) -> None:
    sizes = layer_sizes(build_network(model), height, width)
    assert set(sizes) == {(height >> level, width >> level) for level in range(model.depth + 1)}
    assert sizes[-1] == (height, width)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (640, 320)])
def test_a_heat_map_is_an_eighth_of_the_image(height: int, width: int) -> None:
    model = spec("heatmap", classes=Classes((Class("Tumour", (200, 0, 0)),)))
    image = np.zeros((1, height, width, 3), np.uint8)
    with torch.inference_mode():
        heat = activation(build_network(model).eval()(normalise(image, model)))
    assert heat.permute(0, 2, 3, 1).shape == (1, height // 8, width // 8, 1)
    assert heat.min() > 0 and heat.max() < 1


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_parameters_do_not_depend_on_the_size_of_the_image(model: ModelSpec) -> None:
    networks = [build_network(replace(model, patch_size=size)).eval() for size in (64, 256)]
    shapes = [{name: value.shape for name, value in network.named_parameters()} for network in networks]
    assert shapes[0] == shapes[1]
    with torch.inference_mode():  # and the same parameters answer for any size
        for height, width in ((64, 96), (32, 160)):
            answer = networks[0](torch.zeros(2, 3, height, width))
            scale = 8 if model.architecture == "heatmap" else 1
            assert answer.shape == (2, 3, height // scale, width // scale)


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_every_norm_is_a_batch_norm(model: ModelSpec) -> None:
    norms = {type(layer) for layer in build_network(model).modules() if "Norm" in type(layer).__name__}
    assert norms == {nn.BatchNorm2d}


@pytest.mark.parametrize(("architecture", "depth"), [("unet", 3), ("basic_unet", 4)])
def test_instance_norm_takes_the_place_of_every_batch_norm(architecture: str, depth: int) -> None:
    layers = []
    for norm, halo in (("batch", 0), ("instance", None)):
        torch.manual_seed(0)
        layers.append(list(build_network(spec(architecture, depth=depth, norm=norm, halo=halo)).modules()))
    kinds = [[type(layer) for layer in each] for each in layers]
    assert nn.InstanceNorm2d in kinds[1] and nn.BatchNorm2d not in kinds[1]
    assert [nn.BatchNorm2d if kind is nn.InstanceNorm2d else kind for kind in kinds[1]] == kinds[0]
    assert all(layer.affine for layer in layers[1] if isinstance(layer, nn.InstanceNorm2d))


def test_a_1x1_convolution_is_a_dense_layer_at_each_pixel() -> None:
    network = build_network(spec("heatmap", width=8)).eval()
    convolution = network.get_submodule("head.conv")
    assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
    dense = nn.Linear(convolution.in_channels, convolution.out_channels)
    with torch.inference_mode():
        dense.weight.copy_(convolution.weight[:, :, 0, 0])
        dense.bias.copy_(convolution.bias)
        features = torch.randn(2, convolution.in_channels, 5, 7)
        answer = convolution(features)
        for row in range(5):
            for column in range(7):
                assert torch.allclose(answer[:, :, row, column], dense(features[:, :, row, column]), atol=1e-5)


def test_one_seed_gives_one_network() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_network(spec()).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_normalise_follows_its_formula() -> None:
    model = spec(mean=(0.7, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 9, 3), np.uint8)
    truth = (images.astype(np.float64) / 255 - (0.7, 0.5, 0.6)) / (0.2, 0.3, 0.1)
    for given in (images, torch.from_numpy(images)):
        found = normalise(given, model)
        assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
        assert np.abs(found.permute(0, 2, 3, 1).numpy() - truth).max() < 1e-5


def test_probabilities_of_classes_sum_to_one_and_that_of_one_class_is_a_sigmoid() -> None:
    logits = torch.randn(2, 3, 4, 5) * 4
    assert torch.allclose(activation(logits).sum(dim=1), torch.ones(2, 4, 5))
    assert torch.allclose(activation(logits[:, :1]), 1 / (1 + torch.exp(-logits[:, :1])))


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_a_spec_survives_yaml(model: ModelSpec) -> None:
    model = replace(model, mpp=0.4942, halo=96, stride=32, mean=(0.7, 0.5, 0.6))
    alike = replace(model, normalisation=Normalisation("macenko", ((0.9, 1.1, 0.4), (0.25, 1.0, 0.35))))
    for item in (model, alike):
        assert ModelSpec.from_dict(yaml.safe_load(yaml.safe_dump(item.to_dict()))) == item


def test_a_spec_from_before_normalisation_has_none() -> None:
    values = spec().to_dict()
    del values["normalisation"]
    assert ModelSpec.from_dict(values) == spec()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architecture": "vgg"}, "architecture"),
        ({"architecture": None}, "architecture"),
        ({"depth": 0}, "depth"),
        ({"depth": True}, "depth"),
        ({"depth": 3.0}, "depth"),
        ({"downsample": "average"}, "downsample"),
        ({"upsample": "cubic"}, "upsample"),
        ({"encoder": "resnet18"}, "encoder"),
        ({"architecture": "unet", "downsample": "pool"}, "downsample"),
        ({"architecture": "heatmap", "upsample": "nearest"}, "upsample"),
        ({"architecture": "basic_unet"}, "depth"),
        ({"architecture": "flexible_unet", "depth": 5}, "encoder"),
        ({"architecture": "flexible_unet", "depth": 5, "encoder": "efficientnet-b0"}, "encoder"),
        ({"width": 0}, "width"),
        ({"width": 16.0}, "width"),
        ({"patch_size": 100}, "patch_size"),
        ({"mpp": 0.01}, "mpp"),
        ({"mpp": float("nan")}, "mpp"),
        ({"mpp": "0.5"}, "mpp"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"halo": 30, "stride": 8}, "halo"),
        ({"halo": 32, "stride": 8, "output_stride": 3}, "halo"),
        ({"norm": "instance"}, "norm"),
        ({"architecture": "unet", "norm": "group"}, "norm"),
        ({"architecture": "unet", "norm": "instance", "halo": 32, "stride": 8}, "halo"),
        ({"halo": None}, "halo"),
        ({"architecture": "unet", "norm": "instance", "halo": None, "patch_size": 8}, "patch_size"),
    ],
)
def test_an_impossible_spec_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(NetworkError) as caught:
        spec(**changes)
    assert f"`{key}`" in caught.value.subject and caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"colour": 1}, "unknown key `colour`"),
        ({"classes": [{"name": "Gland"}]}, "color"),
        ({"classes": [{"name": "Gland", "color": [0, 0, 256]}]}, "0 to 255"),
        ({"classes": [{"name": "Gland", "color": [0, 0, 0]}] * 2}, "different names"),
        ({"classes": "Gland"}, "a list"),
        ({"classes": []}, "different names"),
        ({"mean": 0.5}, "a list"),
        ({"normalisation": "macenko"}, "a method"),
        ({"normalisation": {"method": "vahadane", "dyes": []}}, "null, or a method"),
        ({"normalisation": {"method": "macenko", "dyes": 3}}, "a list"),
        ({"normalisation": {"method": "macenko", "dyes": [[1.0, 0.5, 0.2]]}}, "two or three dyes"),
        ({"normalisation": {"method": "macenko", "dyes": [[1.0, 0.5, "x"], [0.1, 0.2, 0.3]]}}, "two or three dyes"),
    ],
)
def test_values_that_are_no_spec_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(NetworkError, match=word):
        ModelSpec.from_dict({**spec().to_dict(), **changes})


def test_a_missing_key_and_no_mapping_are_refused() -> None:
    values = spec().to_dict()
    del values["mpp"]
    with pytest.raises(NetworkError, match="no key `mpp`"):
        ModelSpec.from_dict(values)
    with pytest.raises(NetworkError, match="keys and values"):
        ModelSpec.from_dict([values])


def test_a_spec_from_before_norms_could_be_chosen_means_batch_norm() -> None:
    values = spec("unet").to_dict()
    del values["norm"]
    assert ModelSpec.from_dict(values) == spec("unet")


def test_what_is_not_local_survives_yaml_and_has_no_halo_to_ask_for() -> None:
    model = spec("unet", norm="instance", halo=None, stride=8)
    assert ModelSpec.from_dict(yaml.safe_load(yaml.safe_dump(model.to_dict()))) == model
    with pytest.raises(NetworkError, match="--blend"):
        model.required_halo()
    assert spec("unet", halo=32, stride=8).required_halo() == 32


def test_a_spec_needs_neither_torch_nor_monai() -> None:
    code = "import sys, pipeline.network; sys.exit(bool({'torch', 'monai', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_seed_gives_the_same_weights_where_several_threads_ask() -> None:
    """As on a worker of several threads, in which folds begin side by side."""
    model = spec("unet")
    alone = [seeded_learner(model, seed).state_dict() for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: seeded_learner(model, seed).state_dict(), range(4)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
