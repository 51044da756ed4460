"""Holds a model against the truth after every epoch, over what is known of the slides that validate.

    slides -- survey --> tiles in which something is known -- draw --> the tiles of every epoch -- validate --> confusion

Where that is more than an epoch learns from, so much is drawn once for the whole training, evenly over slides. Tiles without
tissue are not run, as none is that is segmented: what is known there counts as not examined, as in an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.ahead import ahead
from pipeline.classes import IGNORED
from pipeline.config import Config
from pipeline.errors import SlideError
from pipeline.grid import Grid, Tile
from pipeline.machine import threads
from pipeline.metrics import confusion
from pipeline.network import ModelSpec
from pipeline.patches import Source
from pipeline.stitching import usual
from pipeline.tissue import Tissue

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.team import Team

KNOWN_TILE = 512
"""Pixels along a side of a tile where what is known decides which tiles are run: it is often but small fields."""

Opened = Callable[[], tuple[Source, Tissue]]
"""Opens a slide with its truth, and finds its tissue. Raises SlideError."""


@dataclass(frozen=True, eq=False)
class Part:
    """What is looked at of a slide: `tiles` with tissue, and of others what is known, (classes, classes + 1) int64."""

    source: Source
    tiles: tuple[Tile, ...]
    not_examined: np.ndarray


@dataclass(frozen=True, eq=False)
class Validation:
    """What this process looks at, by slide, and the slides of its share that cannot be read.

    All processes together look at `looked_at` of the `known` pixels: those of tiles with tissue in which something is known.
    """

    parts: Mapping[str, Part]
    unread: frozenset[str]
    looked_at: int
    known: int

    @property
    def remark(self) -> str:
        """What to tell where not all is looked at, else nothing."""
        share = f"{self.looked_at / 1e6:.2f} of {self.known / 1e6:.2f} Mpx"
        told = f"validation looks at {share}, as much as an epoch learns from"
        return told if self.looked_at < self.known else ""


@dataclass(frozen=True, eq=False)
class _Survey:
    """The n tiles of a slide in which something is known: `places`, and `pixels` (n,) int64, 0 where there is no tissue."""

    source: Source
    places: Sequence[tuple[int, int]]
    pixels: np.ndarray


def learned_pixels(config: Config) -> int:
    """How many pixels an epoch learns from: no more need be looked at to tell how good a network is."""
    return config.training.patches_per_epoch * config.tiles.patch_size**2


def plan_validation(slides: Mapping[str, Opened], spec: ModelSpec, most: int, seed: int, team: Team) -> Validation:
    """Choose what is looked at after every epoch, each process of a team at its share of the slides.

    That is all that is known, or no more than `most` pixels, but for a part of one tile. It depends on the slides, `most`
    and the seed alone, and not on how many processes there are.
    """
    own = list(slides)[team.rank :: team.size]
    found = dict(ahead(lambda name: _survey(slides[name], spec), own, 2 * threads(), threads()))
    surveys = {name: survey for name, survey in found.items() if survey is not None}
    pixels = _gathered([surveys.get(name) for name in slides], team)
    chosen = draw(pixels, most, seed)
    parts = {name: _part(surveys[name], mask, spec) for name, mask in zip(slides, chosen, strict=True) if name in surveys}
    looked_at = sum(int(area[mask].sum()) for area, mask in zip(pixels, chosen, strict=True))
    return Validation(parts, frozenset(own) - surveys.keys(), looked_at, sum(int(area.sum()) for area in pixels))


def _survey(opened: Opened, spec: ModelSpec) -> _Survey | None:
    """What is known of a slide; None where it cannot be read."""
    try:
        source, tissue = opened()
    except SlideError:
        return None
    places, pixels = list[tuple[int, int]](), list[int]()
    for tile in known_tiles(source, usual(spec).grid(source.lattice, KNOWN_TILE)):
        places.append(tile.index)
        pixels.append(tile.write_roi.area if tissue.fraction(tile.write_roi, source.lattice) > 0 else 0)
    return _Survey(source, places, np.array(pixels, np.int64))


def _gathered(surveys: Sequence[_Survey | None], team: Team) -> list[np.ndarray]:
    """The pixels of all slides' tiles, of which each process has surveyed its own: (n,) int64 of each slide."""
    counts = team.total(np.array([0 if survey is None else len(survey.pixels) for survey in surveys], np.int64))
    own = [
        np.zeros(count, np.int64) if survey is None else survey.pixels for survey, count in zip(surveys, counts, strict=True)
    ]
    return np.split(team.total(np.concatenate([np.zeros(0, np.int64), *own])), np.cumsum(counts))[:-1]


def draw(pixels: Sequence[np.ndarray], most: int, seed: int) -> list[np.ndarray]:
    """Which tiles are looked at, (n,) bool of each slide, given the pixels of its n tiles, 0 for one without tissue.

    Slides take turns, each with a tile of its tissue, drawn at random, until there are `most` pixels together; tiles
    without tissue come along, the same share of them.
    """
    rng, turns = np.random.default_rng(seed), list[np.ndarray]()
    for own in pixels:
        order = rng.permutation(len(own))
        turns.append(np.cumsum(own[order] > 0)[np.argsort(order)])
    sizes, turn = np.concatenate([np.zeros(0, np.int64), *pixels]), np.concatenate([np.zeros(0, np.int64), *turns])
    order = np.lexsort((rng.permutation(len(sizes)), turn))
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(sizes), bool)
    chosen[order[before < most]] = True
    return np.split(chosen, np.cumsum([len(own) for own in pixels]))[:-1]


def _part(survey: _Survey, chosen: np.ndarray, spec: ModelSpec) -> Part:
    """The chosen tiles of a slide."""
    grid, lattice = usual(spec).grid(survey.source.lattice, KNOWN_TILE), survey.source.lattice.shrink(spec.output_stride)
    tiles, classes = list[Tile](), len(spec.classes)
    not_examined = np.zeros((classes, classes + 1), np.int64)
    for at in np.flatnonzero(chosen).tolist():
        tile = grid[survey.places[at]]
        if survey.pixels[at]:
            tiles.append(tile)
        else:
            truth = survey.source.truth.read(tile.target(spec.output_stride), lattice)
            not_examined += confusion(truth, np.full_like(truth, IGNORED), classes)
    return Part(survey.source, tuple(tiles), not_examined)


def validate(validation: Validation, engine: Engine) -> tuple[np.ndarray, set[str]]:
    """Pixels by true and predicted class over what is looked at, at the model's scale, summed over slides.

    Returns (classes, classes + 1) int64 as `metrics.confusion` does, and the slides that cannot be read, of which nothing
    is counted.
    """
    classes, unread = len(engine.spec.classes), set(validation.unread)
    total = np.zeros((classes, classes + 1), np.int64)
    for name, part in validation.parts.items():
        try:
            total += _count(part, engine)
        except SlideError:
            unread.add(name)
    return total, unread


def _count(part: Part, engine: Engine) -> np.ndarray:
    """The confusion of one slide, (classes, classes + 1) int64."""
    spec, way, source, total = engine.spec, usual(engine.spec), part.source, part.not_examined.copy()
    grid = way.grid(source.lattice, KNOWN_TILE)
    lattice = source.lattice.shrink(spec.output_stride)
    for tile, probabilities in way.predict(source.slide, grid, part.tiles, engine):
        labels = probabilities.argmax(axis=0).astype(np.uint8)
        total += confusion(source.truth.read(tile.target(spec.output_stride), lattice), labels, len(spec.classes))
    return total


def known_tiles(source: Source, grid: Grid) -> Iterator[Tile]:
    """The tiles in which something is known."""
    known = source.truth.base.cover(source.truth.known_roi(), source.lattice)
    for tile in grid:
        inside = tile.write_roi.intersect(known)
        if inside.area and (source.truth.read(inside, source.lattice) != IGNORED).any():
            yield tile
