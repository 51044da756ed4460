"""The networks that are measured: random weights, batch norm warmed on the slides' own texture, classes of equal weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.slides import MPP, texture
from pipeline import checkpoint
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.files import replacing
from pipeline.footprint import with_footprint
from pipeline.network import ModelSpec, activation, normalise

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
NETWORKS = {
    "fcn": ModelSpec(architecture="fcn", classes=CLASSES, mpp=MPP, patch_size=256, width=16, depth=3),
    "unet": ModelSpec(architecture="unet", classes=CLASSES, mpp=MPP, patch_size=256, width=32, depth=4, residual_units=2),
}

_BATCHES, _BATCH = 10, 2


def make_model(folder: Path, name: str) -> Path:
    """The folder of a checkpoint of one of NETWORKS, made if it is not there."""
    model = folder / name
    if not model.exists():
        torch.manual_seed(0)
        network = build_network(NETWORKS[name])
        _warm(network, NETWORKS[name])
        checkpoint.save(model, with_footprint(NETWORKS[name], network.eval()), network)
    return model


def make_onnx(model: Path, size: int) -> Path:
    """The model as ONNX beside it, made if it is not there: (1, 3, size, size) RGB, 0 to 255, to probabilities.

    Raises torch.onnx.OnnxExporterError where the library onnx is not installed.
    """
    path = model.with_name(f"{model.name}-{size}.onnx")
    if not path.exists():
        spec, network = checkpoint.load(model)
        with replacing(path) as partial:
            torch.onnx.export(_Whole(spec, network).eval(), (torch.zeros(1, 3, size, size),), partial, dynamo=False)
    return path


def patches(count: int, size: int) -> Iterator[np.ndarray]:
    """`count` places of the slides' texture, (size, size, 3) uint8."""
    cell, rng = texture(), np.random.default_rng(0)
    for _ in range(count):
        y, x = rng.integers(0, len(cell) - size, 2)
        yield cell[y : y + size, x : x + size]


def _warm(network: torch.nn.Module, spec: ModelSpec) -> None:
    """Let batch norms see texture, then shift the last bias until no class is likelier than another."""
    places = list(patches(_BATCHES * _BATCH, spec.patch_size))
    images = [normalise(np.stack(places[start::_BATCHES]), spec) for start in range(_BATCHES)]
    with torch.no_grad():
        for image in images:
            network.train()(image)
        logits = network.eval()(images[0])
        bias = [
            weight for name, weight in network.named_parameters() if name.endswith("bias") and len(weight) == logits.shape[1]
        ]
        bias[-1] -= logits.flatten(2).median(dim=2).values.mean(dim=0)


class _Whole(torch.nn.Module):
    """Normalisation, network and activation in one."""

    def __init__(self, spec: ModelSpec, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, classes, H, W) of RGB (N, 3, H, W), 0 to 255."""
        return activation(self.network((images / 255 - self.get_buffer("mean")) / self.get_buffer("std")))
