"""The engine's answer is the network's own, whatever was done to make it fast."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import engine as house
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.engine import TorchEngine
from pipeline.errors import EngineError, TrainingError
from pipeline.footprint import with_footprint
from pipeline.graph import GraphNetwork
from pipeline.memory import memory_sufficing
from pipeline.network import ModelSpec, activation, normalise
from pipeline.tracing import trace

CLASSES = Classes((Class("Gland", (200, 40, 40)), Class("Stroma", (40, 200, 40)), Class("Fat", (240, 240, 80))))
ALL: dict[str, dict[str, Any]] = {
    "fcn": {"architecture": "fcn"},
    "fcn strided": {"architecture": "fcn", "downsample": "stride", "upsample": "transpose"},
    "heatmap": {"architecture": "heatmap"},
    "classifier": {"architecture": "classifier"},
    "unet": {"architecture": "unet"},
    "basic_unet": {"architecture": "basic_unet", "depth": 4},
    "resnet10": {"architecture": "flexible_unet", "depth": 5, "encoder": "resnet10"},
}


@cache
def model(name: str) -> tuple[ModelSpec, nn.Module]:
    """A spec with its footprint, and a network with lively batch statistics, in training mode."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"classes": CLASSES, "mpp": 1.0, "patch_size": 64, "width": 4, "depth": 3, **ALL[name]}
    spec = ModelSpec(**values)
    network = build_network(spec)
    with torch.no_grad():
        for seed in range(3):
            network.train()(normalise(pixels(64, 96, seed), spec))
    return with_footprint(spec, network), network


def pixels(height: int, width: int, seed: int = 9) -> np.ndarray:
    """Squares of every colour with noise, (1, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (1, -(-height // 8), -(-width // 8), 3)).repeat(8, 1).repeat(8, 2)
    image: np.ndarray = (coarse[:, :height, :width] + rng.integers(0, 56, (1, height, width, 3))).astype(np.uint8)
    return image


def eager(name: str, image: np.ndarray) -> np.ndarray:
    spec, network = model(name)
    with torch.no_grad():
        answer: np.ndarray = activation(network.eval()(normalise(image, spec))).numpy()
    network.train()
    return answer


@pytest.mark.parametrize("name", ALL)
def test_the_answer_is_that_of_the_network_as_it_was_built(name: str) -> None:
    spec, network = model(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    image = pixels(128, 192)
    found, expected = TorchEngine(spec, network)(image), eager(name, image)
    assert found.shape == expected.shape and found.dtype == np.float32 and found.flags.c_contiguous
    assert np.abs(found - expected).max() < 1e-6
    assert expected.std() > 1e-3  # an answer that could be wrong
    assert network.training and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    loaded = GraphNetwork(trace(network, spec), network.state_dict())
    assert np.array_equal(TorchEngine(spec, loaded)(image), found)


@pytest.mark.parametrize("name", ["fcn", "fcn strided", "heatmap", "classifier", "unet", "basic_unet"])
def test_a_tile_is_a_piece_of_the_whole(name: str) -> None:
    spec, network = model(name)
    engine = TorchEngine(spec, network)
    size, halo, scale = 3 * spec.stride, spec.halo, spec.output_stride
    image = pixels(size + 2 * halo + 5 * spec.stride, size + 2 * halo + 2 * spec.stride)
    whole, top, left = engine(image), 4 * spec.stride, spec.stride
    tile = engine(image[:, top : top + size + 2 * halo, left : left + size + 2 * halo])
    inner = slice(halo // scale, (halo + size) // scale)
    rows, columns = (slice((start + halo) // scale, (start + halo + size) // scale) for start in (top, left))
    assert np.abs(tile[:, :, inner, inner] - whole[:, :, rows, columns]).max() < 1e-5


class Flattens(nn.Module):
    """Has no graph, but an answer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.network(image)
        return answer.flatten(2).reshape(answer.shape)


def test_a_network_without_a_graph_runs_as_it_is() -> None:
    spec, network = model("fcn")
    image = pixels(64, 96)
    wrapped = Flattens(network).train()
    assert np.abs(TorchEngine(spec, wrapped)(image) - eager("fcn", image)).max() < 1e-6
    assert wrapped.training


@pytest.mark.parametrize("wrap", [lambda network: network, Flattens], ids=["graph", "no graph"])
def test_fast_computes_in_half_precision_and_leaves_the_network_alone(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(house, "_has_bf16", lambda: True)
    spec, network = model("fcn")
    image = pixels(64, 96)
    fast = TorchEngine(spec, wrap(network), "fast")
    assert {value.dtype for value in fast.network.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    found, expected = fast(image), eager("fcn", image)
    assert found.dtype == np.float32 and 0 < np.abs(found - expected).max() < 0.1
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-6  # softmax is not in half precision


def test_what_torch_or_the_processor_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, network = model("fcn")
    with pytest.raises(EngineError, match="openvino"):
        TorchEngine(spec, network, "fastest")
    monkeypatch.setattr(house, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(house, "_has_bf16", lambda: False)
    with pytest.raises(EngineError, match="multiplies bf16.* Say `exact`"):
        TorchEngine(spec, network, "fast")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")])
def test_windows_that_do_not_fit_into_memory_say_what_to_lower_and_a_training_says_its_own(error: Exception) -> None:
    engine = TorchEngine(*model("fcn"))

    def full(images: torch.Tensor) -> torch.Tensor:
        raise error

    engine.network = full
    with pytest.raises(EngineError, match=r"windows of 96 x 64 px.*segmentation\.tile_size"):
        engine(pixels(64, 96))
    lower = r"no memory for validation .*out of memory.*network\.width"
    with pytest.raises(TrainingError, match=lower), memory_sufficing("validation"):
        engine(pixels(64, 96))
    error.args = ("shapes differ",)
    with pytest.raises(type(error), match="shapes differ"):
        engine(pixels(64, 96))


def test_windows_that_may_not_be_written_to_stay_as_they_are() -> None:
    spec, network = model("fcn")
    image = pixels(64, 96)
    image.flags.writeable = False
    found = TorchEngine(spec, network)(image)
    assert np.abs(found - eager("fcn", image.copy())).max() < 1e-6 and np.array_equal(image, pixels(64, 96))
