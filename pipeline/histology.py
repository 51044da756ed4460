"""Invented tissue in haematoxylin and eosin, drawn from a seed, and what every pixel of it is.

Structures are sites in micrometres. On a coarse lattice every pixel knows how deep it lies inside its structure; magnified
to the slide's pixels, the depth gives the truth by its sign and the drawing by its value, so the two cannot disagree:

    glass | capsule .. stroma .. sheath | basal nuclei, apical cytoplasm, lumen | sheath .. stroma
    tissue < 0             depth < 0    | depth > 0, micrometres inwards        | depth < 0
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GLASS, STROMA, GLAND, TUMOUR, FAT = range(5)

_STEP = 4.0  # micrometres per pixel of the coarse lattice
_PAD = 24  # coarse pixels around the slide
_MARGIN = 4  # rows drawn around a band and cut off again, for the blur
_PERIOD = 1024  # pixels along a side of a texture
_SPACING = 235.0  # micrometres between two structures' centres
_SIZES = {GLAND: (80, 118, 14), TUMOUR: (90, 150, 32), FAT: (110, 160, 20)}  # micrometres: radius from, to, unevenness
_SHARES = {GLAND: 0.42, TUMOUR: 0.34, FAT: 0.24}  # of all structures
_FAR = -200.0  # micrometres: outside every structure
_SEPTUM = 26.0  # micrometres of stroma between two structures
_CAPSULE = 20.0  # micrometres of stroma between a structure and the glass
_FAT_CELL = 48.0  # micrometres between two fat cells
_CELLS = 64  # fat cells along a side of their periodic grid
_STAINS = ((0.65, 0.70, 0.29), (0.11, 0.93, 0.29))  # haematoxylin, eosin: Ruifrok and Johnston 2001, the eosin redder


@dataclass(frozen=True, eq=False)
class Scene:
    """What is where before a pixel is drawn. Fields lie on the padded coarse lattice, textures are periodic."""

    seed: int
    width: int
    height: int
    mpp: float
    tissue: Floats  # micrometres inside the tissue
    depth: Floats  # micrometres inside the nearest structure
    kind: Floats  # class of that structure
    along: Floats  # micrometres along the fibres
    across: Floats  # micrometres across the fibres
    patchy: Floats  # slow variation, standard deviation 1
    nuclei: Floats  # (n, 6): x, y, half length, half width in pixels, angle, density; sorted by y
    scatter: Floats  # (2, 64 * 64): where in its cell of a grid the centre of a fat cell lies, 0 to 1
    fibre: Floats
    blob: Floats
    grain: Floats
    stains: Floats  # (2, 3): optical density of haematoxylin and eosin to red, green, blue
    white: Floats  # (3,): light without tissue, in grey levels


@dataclass(frozen=True, eq=False)
class _Look:
    """The fields and textures at some pixels: what the drawing of a class may depend on. All (n,) float32."""

    depth: Floats
    kind: Floats
    patchy: Floats
    along: Floats
    across: Floats
    fibre: Floats
    blob: Floats
    grain: Floats


def _smooth(rng: Generator, shape: tuple[int, ...], sigma_um: float) -> Floats:
    """Noise on the coarse lattice that varies over `sigma_um`: mean 0, standard deviation 1."""
    step = max(sigma_um / _STEP / 2, 1.0)
    small = rng.standard_normal([int(side / step) + 8 for side in shape], dtype=np.float32)
    small = ndimage.gaussian_filter(small, sigma_um / _STEP / step, mode="wrap")
    box = (3.0, 3.0, 3.0 + shape[1] / step, 3.0 + shape[0] / step)
    return np.array(Image.fromarray(small / small.std()).resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box))


def _texture(rng: Generator, sigma: tuple[float, float]) -> Floats:
    """A periodic noise of (vertical, horizontal) `sigma` in pixels: mean 0, standard deviation 1."""
    spectrum = fft.rfft2(rng.standard_normal((_PERIOD, _PERIOD), dtype=np.float32))
    noise = fft.irfft2(ndimage.fourier_gaussian(spectrum, sigma, n=_PERIOD))
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


def _tissue(rng: Generator, x: Floats, y: Floats, size: tuple[float, float], spread: float) -> Floats:
    """Micrometres inside the tissue: one or two rounded pieces side by side, with ragged edges."""
    pieces, long_side = int(rng.integers(1, 3)), int(size[1] > size[0])
    inside = np.full(x.shape, -np.inf)
    for piece in range(pieces):
        half, power = np.array(size) / 2, rng.uniform(2.4, 3.6)
        centre = half.copy()
        half[long_side] /= pieces
        centre[long_side] = half[long_side] * (2 * piece + 1)
        half = np.maximum(half * spread * rng.uniform(0.94, 1.0, 2), 1e-3)
        u, v = np.abs((x - centre[0]) / half[0]), np.abs((y - centre[1]) / half[1])
        radius = (u**power + v**power) ** (1 / power)
        inside = np.maximum(inside, (1 - radius) * half.min())
    rough = min(min(size) * spread * 0.03, 30.0)
    return np.asarray(inside + rough * (_smooth(rng, x.shape, 90) + 0.25 * _smooth(rng, x.shape, 12)), np.float32)


def _sites(rng: Generator, tissue: Floats) -> list[tuple[float, float, int]]:
    """Centres (x, y in coarse pixels) and classes of the structures: like lies near like, the shares are fixed."""
    spacing = _SPACING / _STEP
    row, column = (v.ravel() for v in np.mgrid[: tissue.shape[0] / spacing + 1, : tissue.shape[1] / spacing + 1])
    x, y = (v + rng.uniform(-0.17, 0.17, v.size) - rng.uniform(0, 1) for v in (column + row % 2 / 2, row * 0.88))
    x, y = x * spacing, y * spacing
    kept = ndimage.map_coordinates(tissue, [y, x], order=1, cval=-1.0) > 45
    x, y = x[kept], y[kept]
    angle = rng.uniform(0, 2 * np.pi)
    rank = np.argsort(np.argsort(x * np.cos(angle) + y * np.sin(angle) + rng.normal(0, spacing, x.size)))
    kinds = rng.permutation(list(_SHARES))
    limits = np.cumsum([_SHARES[int(kind)] for kind in kinds[:-1]])
    chosen = kinds[np.searchsorted(limits, (rank + 0.5) / max(x.size, 1))]
    return [(float(a), float(b), int(c)) for a, b, c in zip(x, y, chosen, strict=True)]


def _structures(rng: Generator, tissue: Floats) -> tuple[Floats, Floats]:
    """(depth, kind): micrometres inside the nearest structure, less half a septum between two, and its class."""
    best, second = np.full(tissue.shape, _FAR, np.float32), np.full(tissue.shape, _FAR, np.float32)
    kind = np.full(tissue.shape, STROMA, np.float32)
    rows, columns = np.ogrid[: tissue.shape[0], : tissue.shape[1]]
    bend = [_smooth(rng, tissue.shape, 55) for _ in range(3)]
    for centre_x, centre_y, which in _sites(rng, tissue):
        low, high, wobble = _SIZES[which]
        radius, aspect, angle = rng.uniform(low, high), rng.uniform(1, 1.3), rng.uniform(0, np.pi)
        reach = (radius * aspect - _FAR) / _STEP
        top, bottom, left, right = (max(int(c + r), 0) for c in (centre_y, centre_x) for r in (-reach, reach))
        window = (slice(top, bottom), slice(left, right))
        dx = (columns[:, left:right] - centre_x) * _STEP + wobble * bend[0][window]
        dy = (rows[top:bottom] - centre_y) * _STEP + wobble * bend[1][window]
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        inside = radius - np.hypot(u / aspect, v * aspect) + 0.5 * wobble * bend[2][window]
        second[window] = np.maximum(second[window], np.minimum(best[window], inside))
        kind[window] = np.where(inside > best[window], which, kind[window])
        best[window] = np.maximum(best[window], inside)
    depth = np.minimum(np.minimum(best, (best - second) / 2 - _SEPTUM / 2), tissue - _CAPSULE)
    return ndimage.gaussian_filter(depth, 1.0), kind


def _nuclei(rng: Generator, tissue: Floats, depth: Floats, kind: Floats, across: Floats, patchy: Floats) -> Floats:
    """(n, 6): x, y in coarse pixels, half length and half width in micrometres, angle, density; in four kinds."""
    inward, fibres = np.arctan2(*np.gradient(depth)), np.arctan2(*np.gradient(across)) + np.pi / 2
    stroma = (depth < -3) & (tissue > 4)
    kinds: tuple[tuple[float, float, float, float, Floats, NDArray[np.bool_]], ...] = (
        (6.0, 4.4, 2.4, 1.15, inward, (kind == GLAND) & (depth > 2) & (depth < 13)),  # epithelium
        (11.0, 5.6, 4.4, 1.2, inward, (kind == TUMOUR) & (depth > 3)),
        (21.0, 7.0, 1.7, 1.2, fibres, stroma),  # spindle cells
        (9.0, 3.0, 2.8, 1.5, inward, stroma & (depth < -9) & (patchy > 1.2)),  # lymphocytes
    )
    groups = []
    for spacing_um, length, width, density, angles, where in kinds:
        spacing = spacing_um / _STEP
        row, column = (v.ravel() for v in np.mgrid[: tissue.shape[0] / spacing - 1, : tissue.shape[1] / spacing - 2])
        x, y = ((v + rng.uniform(0.2, 0.8, v.size)) * spacing for v in (column + row % 2 / 2, row))
        kept = where[y.astype(int), x.astype(int)] & (rng.random(x.size) < 0.9)
        x, y = x[kept], y[kept]
        angle = angles[y.astype(int), x.astype(int)] + rng.normal(0, 0.2, x.size)
        size, shade = np.exp(rng.normal(0, 0.16, (2, x.size))), np.exp(rng.normal(0, 0.12, x.size))
        groups.append(np.stack([x, y, length * size[0], width * size[1], angle, density * shade], 1))
    return np.concatenate(groups).astype(np.float32)


def plan(seed: int, width: int, height: int, mpp: float, spread: float) -> Scene:
    """Everything that `seed` decides; `spread` is the tissue's share of the slide's sides."""
    rng = np.random.default_rng(seed)
    rows, columns = (int(np.ceil(side * mpp / _STEP)) + 2 * _PAD for side in (height, width))
    y, x = ((np.mgrid[:rows, :columns] - _PAD + 0.5) * _STEP).astype(np.float32)
    tissue = _tissue(rng, x, y, (width * mpp, height * mpp), spread)
    depth, kind = _structures(rng, tissue)
    angle = rng.uniform(0, np.pi)
    bent = [36 * _smooth(rng, x.shape, 90) + 4 * _smooth(rng, x.shape, 16) for _ in range(2)]
    across = y * np.cos(angle) - x * np.sin(angle) + bent[0] + 1.5 * np.clip(depth, -70, 0)
    along = x * np.cos(angle) + y * np.sin(angle) + bent[1]
    patchy = _smooth(rng, x.shape, 45)
    nuclei = _nuclei(rng, tissue, depth, kind, across, patchy)
    nuclei[:, :2] = (nuclei[:, :2] + 0.5 - _PAD) * _STEP / mpp
    nuclei[:, 2:4] /= mpp
    stains = np.array(_STAINS) * rng.uniform(0.82, 1.2, (2, 1)) + rng.normal(0, 0.025, (2, 3))
    return Scene(
        *(seed, width, height, mpp, tissue, depth, kind, along, across, patchy),
        nuclei=nuclei[np.argsort(nuclei[:, 1])],
        scatter=rng.uniform(0.15, 0.85, (2, _CELLS * _CELLS)).astype(np.float32),
        fibre=_texture(rng, (0.9 / mpp, 22 / mpp)),
        blob=_texture(rng, (1.8 / mpp, 1.8 / mpp)),
        grain=_texture(rng, (0.35 / mpp, 0.35 / mpp)),
        stains=np.clip(stains, 0.02, None).astype(np.float32),
        white=(rng.uniform(238, 247) + rng.uniform(-3, 3, 3)).astype(np.float32),
    )


def _stroma(look: _Look) -> tuple[Floats, Floats]:
    """(haematoxylin, eosin) of collagen: wavy bundles, clefts, denser around glands, torn off tumour."""
    eosin = 0.55 + 0.13 * look.fibre + 0.07 * look.patchy + 0.04 * look.grain
    eosin += np.where(look.kind == GLAND, 0.25, 0.1) * np.exp(-np.square((look.depth + 2) / 2.2))
    torn = (look.kind == TUMOUR) * np.clip(look.patchy + 0.6, 0, 0.9) * np.exp(-np.square((look.depth + 3) / 2))
    cleft = np.maximum(torn, np.clip(look.fibre - 0.5 * look.blob - 1.7, 0, 0.9))
    return (0.1 + 0.03 * look.blob) * (1 - cleft), eosin * (1 - cleft)


def _gland(look: _Look) -> tuple[Floats, Floats]:
    """(haematoxylin, eosin) of columnar cells with goblet vacuoles round a lumen with wisps of mucin."""
    wall = 30 + 4 * look.patchy + 1.5 * look.blob
    lumen = np.clip((look.depth - wall) / 1.5 + 0.5, 0, 1)
    goblet = np.clip(2 * look.blob - 1.2, 0, 0.75) * (look.depth > 12)
    apical = 0.25 * np.exp(-np.square((look.depth - wall) / 1.6))
    wisps = np.clip(0.5 + 0.35 * look.fibre + 0.3 * look.patchy + 0.15 * look.blob, 0, 1.5)
    haematoxylin = (0.24 + 0.04 * look.grain) * (1 - goblet) * (1 - lumen) + (0.05 + 0.07 * wisps) * lumen
    eosin = (0.38 + 0.05 * look.grain) * (1 - goblet) * (1 - lumen) + (0.03 + 0.06 * wisps) * lumen + apical
    return haematoxylin, eosin


def _tumour(look: _Look) -> tuple[Floats, Floats]:
    """(haematoxylin, eosin) of the cytoplasm of a tumour nest."""
    return 0.26 + 0.05 * look.blob + 0.03 * look.grain, 0.4 + 0.06 * look.patchy + 0.06 * look.blob + 0.05 * look.grain


def _fat(scatter: Floats, look: _Look) -> tuple[Floats, Floats]:
    """(haematoxylin, eosin) of fat cells: empty, with thin walls where two of the nearest centres are equally far."""
    at = np.stack([look.along, look.across]) / _FAT_CELL
    cell = np.floor(at).astype(np.int32)
    inner = (at - cell).astype(np.float32)
    first, second, third = (np.full(look.depth.shape, 3 * _FAT_CELL, np.float32) for _ in range(3))
    for i, j in np.ndindex(3, 3):
        index = (cell[0] + i - 1) % _CELLS * _CELLS + (cell[1] + j - 1) % _CELLS
        far = np.hypot(inner[0] - i + 1 - scatter[0][index], inner[1] - j + 1 - scatter[1][index]) * _FAT_CELL
        third = np.minimum(third, np.maximum(second, far))
        second = np.minimum(second, np.maximum(first, far))
        first = np.minimum(first, far)
    walls = np.stack([(second - first) / 2, (third - first) / 2, look.depth])
    nearest = -3 * np.log(np.exp(-walls / 3).sum(0))
    wall = 1 / (1 + np.exp((nearest - 0.2) / 0.45))
    return 0.01 + 0.08 * wall, 0.015 + 0.5 * wall * (1 + 0.2 * look.fibre)


def _stamp(nuclei: Floats, texture: Floats, mpp: float, top: int, shape: tuple[int, int]) -> Floats:
    """Haematoxylin of the nuclei in the rows from `top` on; a rim, mottled chromatin, no two outlines alike."""
    drawn = np.zeros(shape, np.float32)
    most = nuclei[:, 2].max(initial=0) * 1.2 + 2
    low, high = np.searchsorted(nuclei[:, 1], (top - most, top + shape[0] + most))
    near = nuclei[low:high][np.argsort(nuclei[low:high, 2])]
    for group in np.array_split(near, len(near) // 500 + 1):
        reach = int(group[:, 2].max(initial=0) * 1.2) + 2
        offset = np.arange(-reach, reach + 1, dtype=np.float32)
        x, y, length, width, angle, density = (v[:, None, None] for v in group.T)
        columns, rows = np.floor(x) + offset, np.floor(y) + offset[:, None]
        dx, dy, across, down = columns - x, rows - y, columns.astype(np.intp), rows.astype(np.intp)
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / length
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / width
        radius = np.hypot(u, v) + 0.1 * texture[down % _PERIOD, across % _PERIOD]
        pale = np.clip(width * mpp / 9, 0, 0.45)
        body = np.clip((1 - radius) * width + 0.5, 0, 1) * density * (1 - pale + pale * radius * radius * radius)
        body += 0.5 * ((pale > 0.3) & (np.hypot(u - 0.25, v) < 0.2))
        inside = (down >= top) & (down < top + shape[0]) & (across >= 0) & (across < shape[1]) & (body > 0)
        np.maximum.at(drawn.reshape(-1), ((down - top) * shape[1] + across)[inside], body[inside])
    return drawn


def _zoom(scene: Scene, field: Floats, top: int, bottom: int) -> Floats:
    """A coarse field at the slide's pixels in the rows [top, bottom)."""
    scale = scene.mpp / _STEP
    box = (_PAD, _PAD + top * scale, _PAD + scene.width * scale, _PAD + bottom * scale)
    return np.asarray(Image.fromarray(field).resize((scene.width, bottom - top), Image.Resampling.BICUBIC, box))


def draw(scene: Scene, top: int, bottom: int) -> tuple[Bytes, Bytes]:
    """(image, truth) of the rows [top, bottom)."""
    top, bottom = top - _MARGIN, bottom + _MARGIN
    shape = (bottom - top, scene.width)
    y, x = np.ogrid[top:bottom, : scene.width]
    tissue, depth, patchy, along, across = (
        _zoom(scene, f, top, bottom) for f in (scene.tissue, scene.depth, scene.patchy, scene.along, scene.across)
    )
    coarse = tuple(((v + 0.5) * scene.mpp / _STEP + _PAD).astype(int) for v in (y, x))
    kind = scene.kind[coarse]
    truth = np.where(tissue < 0, GLASS, np.where(depth > 0, kind, STROMA)).astype(np.uint8)
    bent = [(v / scene.mpp).astype(np.int32) % _PERIOD for v in (across, along)]
    fibre = scene.fibre.ravel()[bent[0] * _PERIOD + bent[1]]
    blob, grain = scene.blob[y % _PERIOD, x % _PERIOD], scene.grain[y % _PERIOD, x % _PERIOD]
    dyes = np.zeros((2, *shape), np.float32)
    for which, dye in ((STROMA, _stroma), (GLAND, _gland), (TUMOUR, _tumour), (FAT, partial(_fat, scene.scatter))):
        at = truth == which
        dyes[:, at] = dye(_Look(*(f[at] for f in (depth, kind, patchy, along, across, fibre, blob, grain))))
    dyes[0] += _stamp(scene.nuclei, scene.blob, scene.mpp, top, shape) * (truth != GLASS) * (1 + 0.2 * grain)
    dyes = ndimage.gaussian_filter(dyes, (0, 0.35 / scene.mpp, 0.35 / scene.mpp), radius=(0, 3, 3))
    dyes, truth = np.clip(dyes[:, _MARGIN:-_MARGIN], 0, None), truth[_MARGIN:-_MARGIN]
    lamp = 1 - 0.05 * ((x / scene.width - 0.5) ** 2 + (y[_MARGIN:-_MARGIN] / scene.height - 0.5) ** 2)
    light = scene.white * np.exp(-np.tensordot(dyes, scene.stains, (0, 0))) * lamp[..., None].astype(np.float32)
    light += 2 * np.random.default_rng((scene.seed, top + _MARGIN)).standard_normal(light.shape, np.float32)
    return np.clip(light, 0, 255).astype(np.uint8), truth
