"""The forward pass: RGB windows in, class probabilities out."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pipeline.errors import EngineError, NetworkError
from pipeline.fusion import fuse
from pipeline.graph import GraphNetwork
from pipeline.memory import lacks_memory
from pipeline.network import ModelSpec, activation, normalise
from pipeline.tracing import trace

if TYPE_CHECKING:
    from pipeline.settings import Precision


class Engine(Protocol):
    """A model that is ready to run."""

    spec: ModelSpec

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """Probabilities for (N, H, W, 3) uint8 RGB, H and W multiples of the model's stride.

        Returns (N, classes, H / output_stride, W / output_stride) float32, 0 to 1. Raises EngineError where a GPU's memory
        does not suffice.
        """


class TorchEngine:
    """Runs a copy of a network with torch, its batch norm folded away, on the GPU where there is one.

    `precision` exact computes in fp32, not in the TF32 that a GPU would take for it; fast in the half precision that the
    device has; softmax is always in fp32. Raises EngineError where the device has none, and for fastest.
    """

    def __init__(self, spec: ModelSpec, network: torch.nn.Module, precision: Precision = "exact") -> None:
        self.spec, self.device = spec, _device()
        self.dtype = _dtype(self.device, precision)
        if precision == "exact":
            compute_in_fp32()
        lean = _lean(spec, network).to(self.device, self.dtype)
        self.network = lean.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Engine."""
        pixels = torch.from_numpy(windows if windows.flags.writeable else windows.copy())
        try:
            with torch.inference_mode():
                images = normalise(pixels.to(self.device), self.spec).to(self.dtype)
                logits = self.network(images)
                # Class by class in memory, as tiles are cropped and stored.
                probabilities: np.ndarray = activation(logits.to(torch.float32).contiguous()).cpu().numpy()
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            found = f"no memory for windows of {windows.shape[2]} x {windows.shape[1]} px"
            remedy = "Set a smaller `segmentation.tile_size` (--tile-size); what is begun has to be deleted."
            raise EngineError(str(self.device), found, "a device with more", remedy) from error
        return probabilities


def compute_in_fp32() -> None:
    """Have a GPU compute in this process what is fp32 in fp32, and not in the TF32 that it would take for it."""
    for part in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):  # type: ignore[attr-defined]
        part.fp32_precision = "ieee"


def _lean(spec: ModelSpec, network: torch.nn.Module) -> torch.nn.Module:
    """The network fused, where it has a graph; else a copy of it as it is."""
    if isinstance(network, GraphNetwork):
        return fuse(network)
    try:
        return fuse(GraphNetwork(trace(network, spec), network.state_dict()))
    except NetworkError:
        return deepcopy(network).eval()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name() -> str:
    """What torch computes on here, such as the name of a GPU."""
    device = _device()
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def _dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """What a device computes in. Raises EngineError."""
    if precision == "exact":
        return torch.float32
    if precision == "fastest":
        found = "torch, which computes in no int8"
        raise EngineError("engine.precision fastest", found, "OpenVINO", "Say engine.backend=openvino, or `fast`.")
    if device.type == "cpu" and not _has_bf16():
        found = f"a processor of {torch.backends.cpu.get_cpu_capability()}"
        remedy = "Say `exact`, or `fastest` with engine.backend=openvino."
        raise EngineError("engine.precision fast", found, "one that multiplies bf16, from AVX-512 up, or a GPU", remedy)
    return _half(device)


def require_ability(precision: Precision) -> None:
    """Raise EngineError where what torch computes on here does not compute in that precision."""
    _dtype(_device(), precision)


def torch_half() -> str:
    """The half precision of `fast` with torch on the device that it finds here."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}[_half(_device())]


def _half(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def _has_bf16() -> bool:
    """Whether the processor takes bf16 at all: without, torch falls back to loops that take many times as long as fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
