"""`make bench`: how fast a slide is segmented, beside the bare forward pass and MONAI's sliding window.

Every contender is a process of its own, run three times in turn on the same weights and the same slide; medians count. The
clock starts when the model is loaded. Results go to benchmarks/results as Markdown, with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.classes import Class, Classes
from pipeline.cluster import cores, worker_environment
from pipeline.grid import Grid

SIZE, TILE, RUNS = 4096, 1024, 3
RESULTS = Path(__file__).parent / "results"
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
NETWORKS = {"small FCN": ("fcn", 16, 3), "MONAI UNet": ("unet", 32, 4)}


def prepare(folder: Path) -> None:
    """A slide that is all tissue, and a model of each network with random weights and warmed batch norms."""
    import torch

    from pipeline.architectures import build_network
    from pipeline.checkpoint import save
    from pipeline.footprint import with_footprint
    from pipeline.network import ModelSpec
    from pipeline.phantom import render, write_slide

    write_slide(render(1, SIZE, SIZE, 0.5, spread=4)[0], folder / "slide.tiff", 0.5)
    for name, (architecture, width, depth) in NETWORKS.items():
        spec = ModelSpec(architecture=architecture, classes=CLASSES, mpp=0.5, patch_size=256, width=width, depth=depth)
        torch.manual_seed(0)
        network = build_network(spec)
        with torch.no_grad():
            for _ in range(10):
                network.train()(torch.randn(2, 3, 128, 160))
        save(folder / name, with_footprint(spec, network.eval()), network)


def limit(folder: Path, model: Path) -> tuple[float, np.ndarray]:
    """The bare forward pass over windows that are in memory already; nothing is read or written."""
    from pipeline.runtime import load_engine
    from pipeline.slide import open_slide

    slide, engine = open_slide(folder / "slide.tiff"), load_engine(model)
    grid = Grid(slide.base, TILE, engine.spec.halo, engine.spec.stride)
    windows = [slide.read(tile.read_roi, slide.base)[None] for tile in grid]
    started = time.perf_counter()
    answers = [engine(window)[0].argmax(0).astype(np.uint8) for window in windows]
    seconds = time.perf_counter() - started
    labels = np.zeros(slide.base.shape, np.uint8)
    for tile, answer in zip(grid, answers, strict=True):
        labels[tile.target(1).slices()] = answer[tile.crop(1).slices()]
    return seconds, labels


def fullfield(folder: Path, model: Path) -> tuple[float, np.ndarray]:
    """Read, run, crop and write, as a worker of `fullfield segment` does."""
    from pipeline.canvas import create_canvas
    from pipeline.prediction import predict
    from pipeline.runtime import load_engine
    from pipeline.slide import open_slide

    slide, engine = open_slide(folder / "slide.tiff"), load_engine(model)
    grid = Grid(slide.base, TILE, engine.spec.halo, engine.spec.stride)
    with TemporaryDirectory(dir=folder) as place:
        canvas = create_canvas(Path(place) / "out.ome.zarr", slide.base, CLASSES, TILE, {})
        started = time.perf_counter()
        for tile, probabilities in predict(slide, grid, grid, engine):
            canvas.write(tile.target(1), probabilities)
        return time.perf_counter() - started, canvas.read_labels(slide.base.roi)


def monai_sliding_window(folder: Path, model: Path) -> tuple[float, np.ndarray]:
    """MONAI's SlidingWindowInferer with its usual settings, on an image that is in memory already."""
    import torch
    from monai.inferers.inferer import SlidingWindowInferer

    from pipeline.checkpoint import load
    from pipeline.network import normalise
    from pipeline.slide import open_slide

    slide = open_slide(folder / "slide.tiff")
    spec, network = load(model)
    image = normalise(slide.read(slide.base.roi, slide.base)[None], spec).contiguous()
    inferer = SlidingWindowInferer(TILE, sw_batch_size=1, overlap=0.25, mode="gaussian")
    started = time.perf_counter()
    with torch.inference_mode():
        labels = inferer(image, network)[0].argmax(0)
    return time.perf_counter() - started, labels.numpy().astype(np.uint8)


CONTENDERS: dict[str, tuple[Callable[[Path, Path], tuple[float, np.ndarray]], bool]] = {
    "limit: bare forward pass": (limit, True),
    "Fullfield": (fullfield, True),
    "MONAI SlidingWindowInferer, as shipped": (monai_sliding_window, False),
    "MONAI SlidingWindowInferer, allocator tuned": (monai_sliding_window, True),
}


def once(name: str, folder: Path, model: Path) -> None:
    """Run one contender in this process and print what it took."""
    seconds, labels = CONTENDERS[name][0](folder, model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    np.save(folder / f"{model.name} {name}.npy", labels)
    print(json.dumps({"seconds": seconds, "gib": peak}))


def measure(name: str, folder: Path, model: Path) -> dict[str, float]:
    """Run one contender in a process of its own."""
    tuned = worker_environment(cores()) if CONTENDERS[name][1] else {"OMP_NUM_THREADS": str(cores())}
    command = [sys.executable, "-m", "benchmarks.bench", "--once", name, str(folder), str(model)]
    done = subprocess.run(command, env={**os.environ, **tuned}, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(folder: Path, network: str) -> list[str]:
    """The Markdown rows of one network: contenders take turns, so that a drift of the machine's speed meets all."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(RUNS):
        for name in CONTENDERS:
            found[name].append(measure(name, folder, folder / network))
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    exact = np.load(folder / f"{network} limit: bare forward pass.npy")
    rows = []
    for name, runs in found.items():
        differ = np.mean(np.load(folder / f"{network} {name}.npy") != exact)
        rows.append(
            f"| {network} | {name} | {seconds[name]:.1f} | {SIZE**2 / 1e6 / seconds[name]:.2f} | "
            f"{seconds[name] / seconds['Fullfield']:.2f} | {max(run['gib'] for run in runs):.2f} | {differ:.2%} |"
        )
    return rows


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--once", nargs=3, metavar=("NAME", "FOLDER", "MODEL"))
    chosen = parser.parse_args().once
    if chosen:
        once(chosen[0], Path(chosen[1]), Path(chosen[2]))
        return
    lines = [
        f"{SIZE} x {SIZE} px, all tissue, tiles of {TILE} px, fp32, {cores()} cores ({platform.machine()}); "
        f"torch {version('torch')}, MONAI {version('monai')}; {date.today()}; medians of {RUNS} runs",
        "",
        "| network | contender | s | Mpx/s | times Fullfield's | peak GiB | labels that differ |",
        "|---|---|---|---|---|---|---|",
    ]
    with TemporaryDirectory() as place:
        prepare(Path(place))
        for network in NETWORKS:
            lines += table(Path(place), network)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "segmentation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
