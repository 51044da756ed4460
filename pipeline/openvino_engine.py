"""The forward pass with OpenVINO on CPUs, in fp32, bf16, fp16 or int8.

    network.xml + .bin -- compile for one shape of window --> blob -- import --> engine
    of openvino_graph.py                                      kept in the cache

A blob serves one kind of processor, one number of threads, one precision and the code that made it.
"""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from pipeline import checksum
from pipeline.errors import EngineError
from pipeline.files import replacing
from pipeline.machine import threads
from pipeline.network import ModelSpec
from pipeline.openvino_graph import graph_digest, import_openvino, openvino_version, read_graph
from pipeline.origin import source_digest
from pipeline.settings import Precision
from pipeline.upsampling import make_convolutions

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest

_KEPT_BLOBS = 16  # of a graph


class OpenVinoEngine:
    """Runs a graph that `export` or `quantise` wrote, compiled for the shape of the windows that it is given.

    `precision` exact computes in fp32, fast in the half precision that the processor has; fastest expects an int8 graph, and
    computes in `beside_int8` what is not int8. With `cache`, a folder, what was compiled is kept there for the next process.
    The graph is read here, and its file may then go. Threads wait for each other. Raises EngineError where OpenVINO is not
    installed, the graph is damaged, or the processor computes in no half precision.
    """

    def __init__(self, spec: ModelSpec, graph: Path, precision: Precision = "exact", cache: Path | None = None) -> None:
        self._core = import_openvino().Core()
        self._core.set_property({"ENABLE_MMAP": False})  # a network file system pulls mapped files from under a process
        self.spec, self._cache, self._model = spec, cache, read_graph(self._core, graph)
        self._settings = {
            # Without this hint a processor with bf16 computes in bf16.
            "INFERENCE_PRECISION_HINT": computed_in(precision).replace("fp", "f"),
            # Pinned, the only threads of two workers would both sit on the first core.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_NUM_THREADS": threads(),
            "NUM_STREAMS": 1,
        }
        self._conditions = self._conditions_of(graph)
        self._requests: dict[tuple[int, ...], InferRequest] = {}
        self._turn = Lock()  # a request that two threads use at once gives one of them the other's answer

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Engine; another shape than the last one, or that turned by a quarter, is compiled for first."""
        with self._turn:
            if windows.shape not in self._requests:
                count, height, width, colours = windows.shape
                turned = (count, width, height, colours)  # as flips ask for it; any other would hold its activations in vain
                self._requests = {shape: request for shape, request in self._requests.items() if shape == turned}
                self._requests[windows.shape] = self._compiled(windows.shape).create_infer_request()
            request = self._requests[windows.shape]
            # The answer is a copy: a request's own memory is written again by the next call.
            answer: np.ndarray = request.infer({0: np.ascontiguousarray(windows)}, share_inputs=True)[0]
        return answer

    def _compiled(self, shape: tuple[int, ...]) -> CompiledModel:
        """The graph made ready for one shape of windows, from the cache where it is there."""
        if self._cache is None:
            return self._compile(shape)
        path = self._cache / f"{'x'.join(map(str, shape))}-{self._conditions}.blob"
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
        model = self._model.clone()
        if self._settings["INFERENCE_PRECISION_HINT"] != "f32":  # tiled equals whole in half precision too
            make_convolutions(model, every=True)
        model.reshape(list(shape))
        return self._core.compile_model(model, "CPU", self._settings)

    def _conditions_of(self, graph: Path) -> str:
        """Digits for all but the shape that what is compiled depends on: graph, code, processor and settings."""
        processor = [self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        content = (graph_digest(graph), openvino_version(), source_digest())
        return hashlib.sha256(repr((content, processor, self._settings)).encode()).hexdigest()[:32]


def half() -> str:
    """The half precision of `fast` on a processor like this one, told without importing OpenVINO."""
    return "fp16" if platform.machine().lower() in ("aarch64", "arm64") else "bf16"


def beside_int8() -> str:
    """What `fastest` computes in where a graph is not int8: `half` on a processor that does, else fp32.

    Raises EngineError where OpenVINO is not installed.
    """
    return half() if half().upper() in _abilities() else "fp32"


def computed_in(precision: Precision) -> str:
    """What this processor computes in where a graph is not int8.

    Raises EngineError where it is to be a half precision that the processor does not have.
    """
    if precision == "exact":
        return "fp32"
    found = beside_int8()
    if precision == "fast" and found != half():
        remedy = "Say `exact`, or `fastest` for int8."
        abilities = f"a processor that computes in {', '.join(_abilities())}"
        raise EngineError("engine.precision fast", abilities, f"one with {half()}", remedy)
    return found


@cache
def _abilities() -> tuple[str, ...]:
    return tuple(import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
