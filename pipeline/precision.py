"""Less than fp32 is held against fp32 on validation tissue first; approval.py has what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pipeline.approval import Deviation
from pipeline.classes import IGNORED
from pipeline.grid import round_up
from pipeline.metrics import confusion, ratios
from pipeline.patches import PatchIndex, Source, patch_roi
from pipeline.stitching import usual
from pipeline.tissue import Tissue
from pipeline.validation import KNOWN_TILE, known_tiles

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.network import ModelSpec

_PATCHES = 100  # for calibration: figures no longer change with more


def measure_deviation(exact: Engine, other: Engine, sources: Iterable[tuple[Source, Tissue]]) -> Deviation:
    """Run both engines over all tissue of the slides of which something is known, and compare.

    A pixel for which one of them has no number has changed, and infinitely.
    """
    both, way, classes = _Both(exact, other), usual(exact.spec), len(exact.spec.classes)
    counts = np.zeros((2, classes, classes + 1), np.int64)
    pixels, changed, largest = 0, 0, 0.0
    for source, tissue in sources:
        grid = way.grid(source.lattice, KNOWN_TILE)
        lattice = source.lattice.shrink(exact.spec.output_stride)
        tiles = (tile for tile in known_tiles(source, grid) if tissue.fraction(tile.write_roi, source.lattice) > 0)
        for tile, probabilities in way.predict(source.slide, grid, tiles, both):
            target = tile.target(exact.spec.output_stride)
            truth = np.where(tissue.sampled(target, lattice), source.truth.read(target, lattice), IGNORED)
            known, answers = truth != IGNORED, probabilities.reshape(2, classes, *truth.shape)
            if not known.any():
                continue
            labels = answers.argmax(axis=1).astype(np.uint8)
            counts += [confusion(truth, each, classes) for each in labels]
            pixels += int(known.sum())
            numbers = np.isfinite(answers).all(axis=(0, 1))  # half precision may overflow
            changed += int(((labels[0] != labels[1]) | ~numbers)[known].sum())
            largest = max(largest, float(np.abs(answers[0] - answers[1])[:, known & numbers].max(initial=0)))
            if not numbers[known].all():
                largest = math.inf
    return Deviation(pixels, changed / max(pixels, 1), _dice_change(counts, exact.spec), largest)


def calibration_patches(index: PatchIndex, sources: Mapping[str, Source], size: int, spec: ModelSpec) -> list[np.ndarray]:
    """Patches of training tissue as slides show it, not augmented: (H, W, 3) uint8, of `size` or the next whole strides."""
    patches = []
    for position in range(_PATCHES):
        rng = np.random.default_rng(position)
        shown = index.draw(size, rng)
        source = sources[shown.slide_id]
        roi = patch_roi(shown, source, round_up(size, spec.stride), rng)
        patches.append(source.slide.read(roi, source.lattice))
    return patches


class _Both:
    """Two engines as one, so that slides are read once; the second's classes follow the first's."""

    def __init__(self, first: Engine, second: Engine) -> None:
        self.spec, self._engines = first.spec, (first, second)

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Engine."""
        return np.concatenate([engine(windows) for engine in self._engines], axis=1)


def _dice_change(counts: np.ndarray, spec: ModelSpec) -> float:
    """The largest change of a class's Dice, of those that either engine or the truth knows."""
    first, second = ratios(counts, spec.rest)["dice"]
    changes = np.abs(second - first)
    return float(np.nanmax(changes)) if not np.isnan(changes).all() else 0.0
