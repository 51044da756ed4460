"""The forward pass with OpenVINO on CPUs, in fp32, bf16, fp16 or int8; the only importer of openvino and nncf.

    checkpoint -- export --> network.xml + .bin -- compile for one shape of window --> blob -- import --> engine
                                |  any shape, fp32                                      kept in the cache
                                `-- quantise --> int8/network.xml + .bin

The graph holds all of it, from uint8 pixels to probabilities, so that a process that finds it needs no torch.
"""

from __future__ import annotations

import hashlib
import io
import logging
import platform
import shutil
import sys
import uuid
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import checksum
from pipeline.config import Precision
from pipeline.errors import EngineError
from pipeline.files import file_digest, replacing
from pipeline.machine import threads
from pipeline.network import ModelSpec, activation

if TYPE_CHECKING:
    import torch
    from openvino import CompiledModel, InferRequest, Model

GRAPH = "network.xml"
_WEIGHTS = "network.bin"
_KEPT_FIRST, _KEPT_LAST = 1, 2  # convolutions
_KEPT_BLOBS = 16  # of a graph


class OpenVinoEngine:
    """Runs a graph that `export` or `quantise` wrote, compiled for the shape of the windows that it is given.

    `precision` exact computes in fp32, fast in the half precision that the processor has; fastest expects an int8 graph.
    With `cache`, a folder, what was compiled is kept there for the next process. Threads wait for each other. Raises
    EngineError where OpenVINO is not installed, the graph is damaged, or the processor computes in no half precision.
    """

    def __init__(self, spec: ModelSpec, graph: Path, precision: Precision = "exact", cache: Path | None = None) -> None:
        core = import_openvino().Core()
        self.spec, self._graph, self._cache = spec, graph, cache
        self._settings = {
            # Without this hint a processor with bf16 computes in bf16.
            "INFERENCE_PRECISION_HINT": _half_hint(core) if precision == "fast" else "f32",
            # Pinned, the only threads of two workers would both sit on the first core.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_NUM_THREADS": threads(),
            "NUM_STREAMS": 1,
        }
        self._core = core
        self._requests: dict[tuple[int, ...], InferRequest] = {}
        self._turn = Lock()  # a request that two threads use at once gives one of them the other's answer

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Engine; another shape than the last two is compiled for first."""
        with self._turn:
            request = self._requests.pop(windows.shape, None)
            if request is None:
                self._requests = dict(list(self._requests.items())[-1:])
                request = self._compiled(windows.shape).create_infer_request()
            self._requests[windows.shape] = request  # the last one is the latest
            # The answer is a copy: a request's own memory is written again by the next call.
            answer: np.ndarray = request.infer({0: np.ascontiguousarray(windows)}, share_inputs=True)[0]
        return answer

    def _compiled(self, shape: tuple[int, ...]) -> CompiledModel:
        """The graph made ready for one shape of windows, from the cache where it is there."""
        if self._cache is None:
            return self._compile(shape)
        path = self._cache / f"{'x'.join(map(str, shape))}-{self._conditions()}.blob"
        if path.is_file():
            try:
                compiled = self._core.import_model(checksum.verified(path.read_bytes()), "CPU", self._settings)
            except (RuntimeError, ValueError, OSError):  # a damaged file is worth no more than none
                path.unlink(missing_ok=True)
            else:
                with suppress(OSError):
                    path.touch()
                return compiled
        compiled = self._compile(shape)
        with suppress(OSError), replacing(path) as partial:  # where the disk is full, the next process compiles as well
            partial.write_bytes(checksum.signed(compiled.export_model().getvalue()))
        self._forget_oldest()
        return compiled

    def _forget_oldest(self) -> None:
        """Each blob holds all weights, and small slides of many sizes ask for many: keep those that were used last."""
        assert self._cache is not None
        with suppress(OSError):  # another process may be at it
            for path in sorted(self._cache.glob("*.blob"), key=lambda path: path.stat().st_mtime)[:-_KEPT_BLOBS]:
                path.unlink()

    def _compile(self, shape: tuple[int, ...]) -> CompiledModel:
        model = _read(self._core, self._graph)
        model.reshape(list(shape))
        return self._core.compile_model(model, "CPU", self._settings)

    def _conditions(self) -> str:
        """Digits for all but the shape that what is compiled depends on: graph, OpenVINO, processor and settings."""
        processor = [self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        content = (graph_digest(self._graph), version("openvino"))
        return hashlib.sha256(repr((content, processor, self._settings)).encode()).hexdigest()[:32]


def installed() -> bool:
    """Whether OpenVINO is there."""
    return find_spec("openvino") is not None


def half() -> str:
    """The half precision of `fast` on a processor like this one, told without importing OpenVINO."""
    return "fp16" if platform.machine().lower() in ("aarch64", "arm64") else "bf16"


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
    if find_spec("nncf") is None:
        raise _missing("nncf")
    import nncf

    nncf.set_log_level(logging.ERROR)
    model = _read(openvino.Core(), graph)
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


def _half_hint(core: Any) -> str:
    """What OpenVINO calls `half` where it asks for it: bf16 or f16. Raises EngineError where this one does not have it."""
    abilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if half().upper() in abilities:
        return half().replace("fp", "f")
    found = f"a processor that computes in {', '.join(abilities)}"
    raise EngineError("engine.precision fast", found, f"one with {half()}", "Say `exact`, or `fastest` for int8.")


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
    return frontend.convert(frontend.load(decoder))


def _delicate(model: Model) -> list[str]:
    """The names of the convolutions that stay in fp32: next to the image and next to the answer.

    Those cost a tenth of the speed, and keep labels: of a gland segmenter's, 0.5 % changed instead of 1.2 %.
    """
    names = [node.get_friendly_name() for node in model.get_ordered_ops() if "Convolution" in node.get_type_name()]
    return [*names[:_KEPT_FIRST], *names[-_KEPT_LAST:]]


def _read(core: Any, graph: Path) -> Model:
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
    """Write a graph under another name first; where another process was faster, its folder stays.

    Raises EngineError where it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        openvino.save_model(model, partial / GRAPH, compress_to_fp16=False)
        partial.rename(folder)
    except (OSError, RuntimeError) as error:
        if (folder / GRAPH).is_file():
            return
        found, remedy = f"it cannot be written ({error})", "Make room there, or set XDG_CACHE_HOME to a folder with more."
        raise EngineError(str(folder), found, "room for the network", remedy) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
