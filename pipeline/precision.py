"""How far a precision below fp32 is from fp32, measured on validation tissue; approval.py says what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pipeline.approval import Deviation
from pipeline.classes import IGNORED
from pipeline.errors import SlideError
from pipeline.grid import round_up
from pipeline.metrics import confusion, ratios
from pipeline.patches import PatchIndex, Source, first_read, patch_roi
from pipeline.stitching import usual
from pipeline.tissue import PackedTissue, Tissue
from pipeline.validation import KNOWN_TILE, Opened, Part, plan_validation

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.network import ModelSpec

_PATCHES = 100  # for calibration: figures no longer change with more


def measure_deviation(
    exact: Engine, other: Engine, slides: Mapping[str, Opened], most: int, seed: int
) -> tuple[Deviation, list[str]]:
    """Run both engines over tissue of the slides of which something is known, each opened once, and compare.

    That is all such tissue, or no more than `most` pixels of tiles, drawn as those that validate are. A pixel for which one
    of them has no number has changed, and infinitely. Returns also the slides that cannot be read, of which nothing is
    counted.
    """
    from pipeline.team import Alone

    both, classes, tissues = _Both(exact, other), len(exact.spec.classes), dict[str, PackedTissue]()

    def opened(name: str) -> tuple[Source, Tissue]:
        source, tissue = slides[name]()
        tissues[name] = PackedTissue.of(tissue)  # which would else be looked for once more
        return source, tissue

    counts, pixels, changed, largest = np.zeros((2, classes, classes + 1), np.int64), 0, 0, 0.0
    looked_at = plan_validation({name: partial(opened, name) for name in slides}, exact.spec, most, seed, Alone())
    unread = set(looked_at.unread)
    for name, part in looked_at.parts.items():
        try:
            found = list(_compared(both, part, tissues[name]))
        except SlideError:
            unread.add(name)
            continue
        counts += sum(tile.counts for tile in found)
        pixels += sum(tile.pixels for tile in found)
        changed += sum(tile.changed for tile in found)
        largest = max([largest, *(tile.largest for tile in found)])
    deviation = Deviation(pixels, changed / max(pixels, 1), _dice_change(counts, exact.spec), largest)
    return deviation, [name for name in slides if name in unread]


@dataclass(frozen=True)
class _Compared:
    """What one tile showed: the `counts` of both engines, (2, classes, classes + 1) int64, over its known `pixels`; how many
    have another label, and the largest difference of a probability.
    """

    counts: np.ndarray
    pixels: int
    changed: int
    largest: float


def _compared(both: _Both, part: Part, tissue: PackedTissue) -> Iterator[_Compared]:
    """The tiles of one slide that are looked at, as far as tissue is known in them."""
    spec, way, classes, source = both.spec, usual(both.spec), len(both.spec.classes), part.source
    grid, lattice = way.grid(source.lattice, KNOWN_TILE), source.lattice.shrink(spec.output_stride)
    for tile, probabilities in way.predict(source.slide, grid, part.tiles, both):
        target = tile.target(spec.output_stride)
        truth = np.where(tissue.sampled(target, lattice), source.truth.read(target, lattice), IGNORED)
        known, answers = truth != IGNORED, probabilities.reshape(2, classes, *truth.shape)
        if not known.any():
            continue
        labels = answers.argmax(axis=1).astype(np.uint8)
        numbers = np.isfinite(answers).all(axis=(0, 1))  # half precision may overflow
        difference = float(np.abs(answers[0] - answers[1])[:, known & numbers].max(initial=0))
        yield _Compared(
            counts=np.stack([confusion(truth, each, classes) for each in labels]),
            pixels=int(known.sum()),
            changed=int(((labels[0] != labels[1]) | ~numbers)[known].sum()),
            largest=difference if numbers[known].all() else math.inf,
        )


def calibration_patches(index: PatchIndex, sources: Mapping[str, Source], size: int, spec: ModelSpec) -> list[np.ndarray]:
    """Patches of training tissue as slides show it, not augmented: (H, W, 3) uint8, of `size` or the next whole strides.

    One that cannot be read is drawn anew. Raises SlideError where one attempt after the other meets what cannot be read.
    """

    def read(position: int, attempt: int) -> np.ndarray:
        rng = np.random.default_rng([position, attempt])
        shown = index.draw(size, rng)
        source = sources[shown.slide_id]
        return source.slide.read(patch_roi(shown, source, round_up(size, spec.stride), rng), source.lattice)

    return [first_read(partial(read, position)) for position in range(_PATCHES)]


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
