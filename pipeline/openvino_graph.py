"""A network as OpenVINO keeps it: one graph of any size of window, in fp32 or in int8.

    checkpoint -- export --> network.xml + .bin
                                `-- quantise --> int8/network.xml + .bin

The graph holds all of it, from uint8 pixels to probabilities, so that a process that finds it needs no torch.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import EngineError
from pipeline.files import file_digest, new_folder
from pipeline.network import ModelSpec, activation
from pipeline.upsampling import make_convolutions

if TYPE_CHECKING:
    import torch
    from openvino import Model

GRAPH = "network.xml"
_WEIGHTS = "network.bin"
_KEPT_FIRST, _KEPT_LAST = 1, 2  # convolutions


def installed() -> bool:
    """Whether OpenVINO is there."""
    return find_spec("openvino") is not None


def openvino_version() -> str:
    """OpenVINO's version. Raises EngineError where it is not installed."""
    if not installed():
        raise _missing("openvino")
    return version("openvino")


def export(spec: ModelSpec, network: torch.nn.Module, folder: Path) -> Path:
    """Write a network, its normalisation and its activation as an fp32 graph of any batch and size, and return its path.

    It is that of any size for a GraphNetwork, which is what `checkpoint.load` gives; of a network as MONAI built it, tracing
    may fix sizes (flexible_unet's zeros).

    The folder appears whole; one that is there already, perhaps from another process, is left as it is.
    """
    openvino = import_openvino()
    if not (folder / GRAPH).is_file():
        _write_folder(folder, _converted(spec, network), openvino)
    return folder / GRAPH


def quantise(graph: Path, patches: Sequence[np.ndarray], folder: Path) -> Path:
    """Write an int8 form of an exported graph, and return its path.

    Its scales are calibrated once on `patches`, (H, W, 3) uint8 RGB, and fixed: they depend on no window, so tiled equals
    whole. Raises EngineError where nncf is not installed.
    """
    openvino = import_openvino()
    require_quantiser()
    import nncf

    nncf.set_log_level(logging.ERROR)
    model = read_graph(openvino.Core(), graph)
    make_convolutions(model, every=True)
    with redirect_stdout(io.StringIO()):  # its progress bar
        small = nncf.quantize(
            model,
            nncf.Dataset([patch[None] for patch in patches]),
            subset_size=len(patches),
            preset=nncf.QuantizationPreset.MIXED,  # a zero point for values of both signs
            ignored_scope=nncf.IgnoredScope(names=_delicate(model)),
            # Weights of 7 bits: with 8, processors without VNNI overflow, and a graph may be run by any worker.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    shutil.rmtree(folder, ignore_errors=True)
    _write_folder(folder, small, openvino)
    return folder / GRAPH


def require_quantiser() -> None:
    """Raise EngineError where nncf, with which `quantise` works, is not installed."""
    if find_spec("nncf") is None:
        raise _missing("nncf")


def copy_graph(graph: Path, other: Path) -> None:
    """Put a copy of a graph in the place of another one, its folder whole, unless they are the same. Raises OSError."""
    with suppress(EngineError):  # of a graph that lacks a file
        if graph_digest(graph) == graph_digest(other):
            return
    with new_folder(other.parent) as partial:
        shutil.copytree(graph.parent, partial)
        shutil.rmtree(other.parent, ignore_errors=True)


def graph_digest(graph: Path) -> str:
    """A SHA-256 over a graph and its weights, as hexadecimal digits. Raises EngineError where a file is missing."""
    return hashlib.sha256((_sha256(graph) + _sha256(graph.with_name(_WEIGHTS))).encode()).hexdigest()


def import_openvino() -> Any:
    """OpenVINO, kept from reporting to its maker over the network. Raises EngineError where it is not installed."""
    if not installed():
        raise _missing("openvino")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it fails
    import openvino

    return openvino


def _missing(library: str) -> EngineError:
    remedy = (
        'In Fullfield\'s own folder, `python -m pip install --constraint requirements.lock --editable ".[openvino]"`; '
        "or say engine.backend=torch engine.precision=exact."
    )
    return EngineError(f"engine.backend openvino: {library}", "no such library", "it to be installed", remedy)


def _converted(spec: ModelSpec, network: torch.nn.Module) -> Model:
    """The graph from uint8 RGB (N, H, W, 3) to probabilities, each of its sizes left open."""
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from pipeline.fusion import fuse
    from pipeline.graph import GraphNetwork

    lean = fuse(network) if isinstance(network, GraphNetwork) else network

    class Whole(torch.nn.Module):
        """`normalise`, the network and `activation`, in operations that OpenVINO fuses with the first convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.network = lean
            scale = [1 / (255 * std) for std in spec.std]
            shift = [-mean / std for mean, std in zip(spec.mean, spec.std, strict=True)]
            self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))
            self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            images = windows.permute(0, 3, 1, 2).to(torch.float32)
            return activation(self.network(images * self.get_buffer("scale") + self.get_buffer("shift")))

    example = torch.zeros(1, 3 * spec.stride, 2 * spec.stride, 3, dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        # Tracing fixes what Python decides, such as softmax or sigmoid: it depends on the classes, not on the size.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python")
        traced = torch.jit.trace(Whole().eval(), example, check_trace=False)
    frontend, decoder = FrontEndManager().load_by_framework("pytorch"), TorchScriptPythonDecoder(traced)
    model = frontend.convert(frontend.load(decoder))
    make_convolutions(model, every=False)
    return model


def _delicate(model: Model) -> list[str]:
    """The names of the convolutions that stay in fp32: next to the image and next to the answer.

    Those cost a tenth of the speed, and keep labels: of a gland segmenter's, 0.5 % changed instead of 1.2 %.
    """
    names = [node.get_friendly_name() for node in model.get_ordered_ops() if "Convolution" in node.get_type_name()]
    return [*names[:_KEPT_FIRST], *names[-_KEPT_LAST:]]


def read_graph(core: Any, graph: Path) -> Model:
    """A graph as `core`, an openvino.Core, reads it. Raises EngineError where it is missing or damaged."""
    try:
        return core.read_model(graph)
    except RuntimeError as error:
        found = "no such file" if not graph.is_file() else f"a damaged graph ({str(error).splitlines()[-1]})"
        remedy = f"Delete {graph.parent}, and run again."
        raise EngineError(str(graph), found, f"a network as OpenVINO keeps it, beside its {_WEIGHTS}", remedy) from error


def _sha256(path: Path) -> str:
    try:
        return file_digest(path)
    except FileNotFoundError as error:
        remedy = f"Delete {path.parent}, and run again."
        raise EngineError(str(path), "no such file", f"{GRAPH} and {_WEIGHTS}", remedy) from error


def _write_folder(folder: Path, model: Model, openvino: Any) -> None:
    """Write a graph's folder, whole; where another process was faster, its folder stays, if it is whole.

    Raises EngineError where it cannot be written.
    """
    try:
        with new_folder(folder) as partial:
            if (folder / GRAPH).is_file():  # whoever was waited for has written it
                return
            partial.mkdir()
            openvino.save_model(model, partial / GRAPH, compress_to_fp16=False)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one, without a graph
    except (OSError, RuntimeError) as error:
        if (folder / GRAPH).is_file():
            return
        found, remedy = f"it cannot be written ({error})", "Make room there, or set XDG_CACHE_HOME to a folder with more."
        raise EngineError(str(folder), found, "room for the network", remedy) from error
