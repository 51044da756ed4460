"""How fast torch and OpenVINO run each architecture here: the table of `pipeline.runtime.settled`.

    python -m benchmarks.engines [exact|fast] [SIDE]

Windows of SIDE (1024) pixels, random weights, one thread, the allocator as workers have it. Prints Mpx per second of
processor, the best of four, torch and OpenVINO.
"""

from __future__ import annotations

import subprocess
import sys
import time
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.classes import Class, Classes
from pipeline.machine import worker_environment
from pipeline.network import FAMILIES, ModelSpec

_SHAPES = {"flexible_unet": (5, "resnet18")}
_CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))


def speeds(architecture: str, precision: str, side: int) -> tuple[float, float]:
    """Mpx/s with torch and with OpenVINO."""
    import torch

    from pipeline.architectures import build_network
    from pipeline.engine import TorchEngine
    from pipeline.footprint import with_footprint
    from pipeline.graph import GraphNetwork
    from pipeline.openvino_engine import OpenVinoEngine
    from pipeline.openvino_graph import export
    from pipeline.tracing import trace

    depth, encoder = _SHAPES.get(architecture, (4, None))
    spec = ModelSpec(
        architecture=architecture, classes=_CLASSES, mpp=0.5, patch_size=256, width=16, depth=depth, encoder=encoder
    )
    torch.manual_seed(0)
    built = build_network(spec).eval()
    spec = with_footprint(spec, built)
    network = GraphNetwork(trace(built, spec), built.state_dict()).eval()
    window = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    with TemporaryDirectory() as folder:
        graph = export(spec, network, Path(folder) / "graph")
        engines = TorchEngine(spec, network, precision), OpenVinoEngine(spec, graph, precision)  # type: ignore[arg-type]
        seconds = [min(_timed(engine, window) for _ in range(4)) for engine in engines]
    return side**2 / 1e6 / seconds[0], side**2 / 1e6 / seconds[1]


def _timed(engine: object, window: np.ndarray) -> float:
    started = time.process_time()
    engine(window)  # type: ignore[operator]
    return time.process_time() - started


if __name__ == "__main__":
    wanted, size = (*sys.argv[1:], *("exact", "1024")[len(sys.argv) - 1 :])
    if environ.get("OMP_NUM_THREADS") != "1" or "GLIBC_TUNABLES" not in environ:
        sys.exit(
            subprocess.call(
                [sys.executable, "-m", "benchmarks.engines", wanted, size], env={**environ, **worker_environment(1)}
            )
        )
    for name in FAMILIES:
        print(f"{name:14}", *(f"{speed:6.2f}" for speed in speeds(name, wanted, int(size))), flush=True)
