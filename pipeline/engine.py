"""The forward pass: RGB windows in, class probabilities out."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pipeline.checkpoint import digest, load
from pipeline.network import ModelSpec, activation, normalise


class Engine(Protocol):
    """A model that is ready to run."""

    spec: ModelSpec

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """Probabilities for (N, H, W, 3) uint8 RGB, H and W multiples of the model's stride.

        Returns (N, classes, H / output_stride, W / output_stride) float32, 0 to 1.
        """


class TorchEngine:
    """Runs a network with torch, in fp32, on the GPU where there is one."""

    def __init__(self, spec: ModelSpec, network: torch.nn.Module) -> None:
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Engine."""
        with torch.inference_mode():
            images = normalise(torch.tensor(windows, device=self.device), self.spec)
            probabilities: np.ndarray = activation(self.network(images)).cpu().numpy()
        return probabilities


def load_engine(model: Path) -> Engine:
    """The engine of a trained model's folder; a process loads each model once. Raises CheckpointError."""
    return _shared_engine(model, digest(model))


@lru_cache(maxsize=2)
def _shared_engine(model: Path, stamp: str) -> Engine:
    return TorchEngine(*load(model))
