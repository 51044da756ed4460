"""What runs in a process of its own to be measured: the bare forward pass, and MONAI's two ways of doing a slide.

    python -m benchmarks.inside CONTENDER SLIDE MODEL LABELS PRECISION TILE

Writes the labels to LABELS (see labels.py) and prints what it took after start-up, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from benchmarks.labels import BAND, Labels
from pipeline import checkpoint
from pipeline.geometry import Roi
from pipeline.grid import Grid
from pipeline.network import ModelSpec, activation, normalise
from pipeline.runtime import load_engine
from pipeline.settings import EngineSettings, Precision, TissueSettings
from pipeline.slide import open_slide
from pipeline.tissue import find_tissue

if TYPE_CHECKING:
    import torch

PATCH, OVERLAP = 1024, 0.25
"""Of the peers: pixels along a side of a patch, and the share of it that neighbours have in common."""


@dataclass
class Clock:
    """Seconds, and megapixels that were segmented in them."""

    seconds: float = 0.0
    megapixels: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds of a block."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def limit(slide_path: Path, model: Path, labels: Path, precision: Precision, tile_size: int) -> Clock:
    """The bare engine over the windows that Fullfield would read, all in memory; neither reading nor writing counts."""
    slide, engine = open_slide(slide_path), load_engine(model, EngineSettings(precision=precision))
    grid = Grid(slide.base, tile_size, engine.spec.halo or 0, engine.spec.stride)
    tissue = find_tissue(slide, TissueSettings())
    tiles = [tile for tile in grid if tissue.fraction(tile.write_roi, slide.base) > 0]
    windows = [slide.read(tile.read_roi, slide.base)[None] for tile in tiles]
    answer, clock = Labels.create(labels, slide.base.shape), Clock()
    engine(windows[0])  # an engine may compile itself for this shape
    for tile, window in zip(tiles, windows, strict=True):
        with clock.running():
            probabilities = engine(window)[0]
        crop = probabilities[:, *tile.crop(1).slices()]
        answer.write(tile.write_roi, crop.argmax(axis=0))
        clock.megapixels += tile.write_roi.area / 1e6
    return clock


def sliding_window(slide_path: Path, model: Path, labels: Path, precision: Precision, tile_size: int) -> Clock:
    """MONAI's SlidingWindowInferer with its usual settings, on an image that is in memory already."""
    import torch
    from monai.inferers.inferer import SlidingWindowInferer

    slide = open_slide(slide_path)
    spec, network = _as_built(model)
    _limit_memory()
    image = normalise(slide.read(slide.base.roi, slide.base)[None], spec).contiguous()
    inferer, clock = SlidingWindowInferer(PATCH, sw_batch_size=1, overlap=OVERLAP, mode="gaussian"), Clock()
    with clock.running(), torch.inference_mode():
        answer = inferer(image, network)[0].argmax(0)
    Labels.create(labels, slide.base.shape).write(slide.base.roi, answer.numpy())
    return Clock(clock.seconds, slide.base.roi.area / 1e6)


def patch_inferer(merger: str, slide_path: Path, model: Path, labels: Path, precision: Precision, tile_size: int) -> Clock:
    """MONAI's PatchInferer, which reads the slide itself, with one of its mergers."""
    import torch
    from monai.inferers.inferer import PatchInferer
    from monai.inferers.splitter import WSISlidingWindowSplitter

    slide = open_slide(slide_path)
    spec, network = _as_built(model)
    _limit_memory()

    def prepared(patch: torch.Tensor) -> torch.Tensor:
        return normalise(torch.as_tensor(patch).permute(0, 2, 3, 1).contiguous(), spec).contiguous()

    clock = Clock(megapixels=slide.base.roi.area / 1e6)
    with TemporaryDirectory(dir=labels.parent) as place:
        settings: dict[str, Any] = {"store": str(Path(place) / "merged.zarr")} if merger == "ZarrAvgMerger" else {}
        splitter = WSISlidingWindowSplitter(PATCH, overlap=OVERLAP, reader="OpenSlide")
        inferer = PatchInferer(splitter, merger, preprocessing=prepared, postprocessing=activation, **settings)
        with clock.running(), torch.inference_mode():
            merged, answer = inferer(str(slide_path), network), Labels.create(labels, slide.base.shape)
            for top in range(0, slide.base.height, BAND):
                band = Roi(0, top, slide.base.width, BAND).intersect(slide.base.roi)
                answer.write(band, np.asarray(merged[0, :, *band.slices()]).argmax(axis=0))
    return clock


CONTENDERS: dict[str, Callable[[Path, Path, Path, Precision, int], Clock]] = {
    "limit": limit,
    "sliding-window": sliding_window,
    "AvgMerger": lambda *arguments: patch_inferer("AvgMerger", *arguments),
    "ZarrAvgMerger": lambda *arguments: patch_inferer("ZarrAvgMerger", *arguments),
}


def _as_built(model: Path) -> tuple[ModelSpec, torch.nn.Module]:
    """The network as MONAI and torch have it, not as Fullfield's graph of it."""
    from safetensors.torch import load_file

    from pipeline.architectures import build_network

    spec = checkpoint.load_spec(model)
    network = build_network(spec)
    network.load_state_dict(load_file(model / "weights.safetensors"))
    return spec, network.eval()


def _limit_memory() -> None:
    """Let what asks for more than the machine has fail by itself, before the kernel ends another process for it."""
    resource.setrlimit(resource.RLIMIT_AS, (psutil.virtual_memory().total,) * 2)


if __name__ == "__main__":
    name, slide_argument, model_argument, labels_argument, wanted, size = sys.argv[1:]
    took = CONTENDERS[name](Path(slide_argument), Path(model_argument), Path(labels_argument), wanted, int(size))  # type: ignore[arg-type]
    print(json.dumps(asdict(took)))
