"""The networks that are measured, trained for a minute on the slides' own texture.

What they learn is where the stains are, so that their labels have the shapes of tissue: what follows a forward pass
(compressing, outlining) costs what it costs a user, and not what the noise of random weights would.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from skimage.color import rgb2hed

from benchmarks.slides import CELL, MPP, texture
from pipeline import checkpoint
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.files import replacing
from pipeline.footprint import with_footprint
from pipeline.network import ModelSpec, activation, normalise

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Nuclei", (0, 128, 0)), Class("Membrane", (255, 255, 0))))
NETWORKS = {
    "fcn": ModelSpec(architecture="fcn", classes=CLASSES, mpp=MPP, patch_size=256, width=16, depth=3),
    "unet": ModelSpec(architecture="unet", classes=CLASSES, mpp=MPP, patch_size=256, width=32, depth=4, residual_units=2),
}

_STEPS, _BATCH, _LEARNING_RATE = 200, 2, 2e-3
_STAIN_PIXELS = 4  # over which stains are averaged


def make_model(folder: Path, name: str) -> Path:
    """The folder of a checkpoint of one of NETWORKS, made if it is not there."""
    model = folder / name
    if not model.exists():
        torch.manual_seed(0)
        network = build_network(NETWORKS[name])
        _train(network, NETWORKS[name])
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
    cell = texture()
    return (cell[place] for place in _places(count, size))


def stained() -> np.ndarray:
    """The class of each pixel of the texture, (CELL, CELL) uint8: most DAB, else most haematoxylin, else the rest."""
    stains = rgb2hed(texture())
    nuclei, membrane = (ndimage.gaussian_filter(stains[..., stain], _STAIN_PIXELS, mode="wrap") for stain in (0, 2))
    return np.select([membrane > np.quantile(membrane, 2 / 3), nuclei > np.quantile(nuclei, 2 / 3)], [2, 1]).astype(np.uint8)


def _train(network: torch.nn.Module, spec: ModelSpec) -> None:
    """Teach a network where the stains are."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    cell, truth = texture(), stained()
    places = list(_places(_STEPS * _BATCH, spec.patch_size))
    for step in range(_STEPS):
        batch = places[step::_STEPS]
        images = normalise(np.stack([cell[place] for place in batch]), spec)
        wanted = torch.from_numpy(np.stack([truth[place] for place in batch])).long()
        loss = torch.nn.functional.cross_entropy(network(images), wanted)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _places(count: int, size: int) -> Iterator[tuple[slice, slice]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        y, x = rng.integers(0, CELL - size, 2)
        yield slice(y, y + size), slice(x, x + size)


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
