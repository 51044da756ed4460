"""Less than fp32 is held against fp32 on validation tissue first, and used only where labels hardly change.

What was found is written beside the model, so that each later call knows, without running anything, what is approved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.classes import IGNORED
from pipeline.config import EngineSettings
from pipeline.errors import EngineError
from pipeline.files import write_json
from pipeline.grid import round_up
from pipeline.metrics import confusion, ratios
from pipeline.patches import PatchIndex, Source, inside
from pipeline.runtime import describe, engines_folder, held
from pipeline.stitching import usual
from pipeline.tissue import Tissue
from pipeline.validation import KNOWN_TILE, known_tiles

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.network import ModelSpec

_PATCHES = 100  # for calibration: figures no longer change with more


@dataclass(frozen=True)
class Deviation:
    """How far an engine is from the exact one, over `pixels` of known tissue.

    `label_change` is the share, 0 to 1, of pixels with another label; `dice_change` the largest change of a class's Dice,
    up or down; `largest_difference` that of a probability.
    """

    pixels: int
    label_change: float
    dice_change: float
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"{self.label_change:.3%} of {self.pixels} pixels have another label, Dice changes by up to "
            f"{self.dice_change:.4f}, a probability by up to {self.largest_difference:.3f}"
        )


def measure_deviation(exact: Engine, other: Engine, sources: Iterable[tuple[Source, Tissue]]) -> Deviation:
    """Run both engines over all tissue of the slides of which something is known, and compare."""
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
            changed += int((labels[0] != labels[1])[known].sum())
            largest = max(largest, float(np.abs(answers[0] - answers[1])[:, known].max()))
    return Deviation(pixels, changed / max(pixels, 1), _dice_change(counts, exact.spec), largest)


def check(found: Deviation, settings: EngineSettings, model: Path) -> None:
    """Raise EngineError where nothing was compared, or too many labels change."""
    subject = f"{model}, engine.precision {settings.precision}, engine.backend {settings.backend}"
    if not found.pixels:
        remedy = "Annotate a validation slide, or say engine.precision=exact."
        raise EngineError(subject, "no known tissue to hold it against exact on", "some on validation slides", remedy)
    if found.label_change > settings.max_label_change:
        expected = f"no more than {settings.max_label_change:.3%} of labels changed (engine.max_label_change)"
        remedy = "Say engine.precision=exact, or raise engine.max_label_change."
        raise EngineError(subject, str(found), expected, remedy)


def approve(found: Deviation, settings: EngineSettings, model: Path) -> None:
    """Write beside the model what was found of a way to run it. Raises EngineError where it may not be used."""
    check(found, settings, model)
    content = {"engine": describe(model, settings), "max_label_change": settings.max_label_change, "found": asdict(found)}
    write_json(_path(settings, model), content)


def approval(settings: EngineSettings, model: Path) -> Deviation | None:
    """What was found of a way to run the model; None where it was not held against exact, or not approved."""
    try:
        content = json.loads(_path(settings, model).read_text(encoding="utf-8"))
        same = content["engine"] == describe(model, settings)
        return Deviation(**content["found"]) if same else None
    except (FileNotFoundError, EngineError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        path, remedy = str(_path(settings, model)), "Delete it, and run with that precision again."
        raise EngineError(path, f"a damaged file ({error})", "an approval as Fullfield wrote it", remedy) from error


def require_approval(settings: EngineSettings, model: Path) -> None:
    """Raise EngineError where a precision below exact was never approved for the model."""
    if settings.precision != "exact" and approval(settings, model) is None:
        raise EngineError(
            f"{model}, engine.precision {settings.precision}, engine.backend {settings.backend}",
            "a way to run it that was never held against exact",
            "one that was approved on validation tissue",
            f"Run `fullfield run CONFIG engine.precision={settings.precision} engine.backend={settings.backend} "
            f"engine.flips={str(settings.flips).lower()}` with the "
            "configuration that the model was trained with; of a copied model, copy "
            f"{engines_folder(model).parent.name} along. Or say --precision exact.",
        )


def calibration_patches(index: PatchIndex, sources: Mapping[str, Source], size: int, spec: ModelSpec) -> list[np.ndarray]:
    """Patches of training tissue as slides show it, not augmented: (H, W, 3) uint8, of `size` or the next whole strides."""
    patches = []
    for position in range(_PATCHES):
        place = index.draw(round_up(size, spec.stride), 0, 0, position)
        source = sources[place.slide_id]
        patches.append(source.slide.read(inside(place.roi, source.lattice), source.lattice))
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


def _path(settings: EngineSettings, model: Path) -> Path:
    flips = "-flips" if settings.flips else ""
    return engines_folder(model) / f"{held(settings).replace(' ', '-')}-{settings.backend}{flips}.json"
