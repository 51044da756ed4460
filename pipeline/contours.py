"""Outlines of labelled pixels along pixel edges, exact, and put together from pieces.

An outline is known by its *corners*: for each vertex, which of the four pixels around it belong to the component.

    +----+----+
    | NW | NE |     one or three of them: the outline turns here once
    +----v----+     two at a diagonal: it turns here twice, around each of the two other pixels
    | SW | SE |     two side by side, none or all: it does not turn
    +----+----+

Where two pieces of a component meet, the masks of a shared vertex are laid over each other. Along a line of the pixel
grid, outlines run from the first turn to the second, from the third to the fourth, and so on: corners are all it takes.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, depth_first_order

_TURNS = np.array([0, 1, 1, 0, 1, 0, 2, 1, 1, 2, 0, 1, 0, 1, 1, 0])  # by mask: NW 1, NE 2, SW 4, SE 8
_NW_AND_SE = 9
_PAIRS = tuple(combinations(range(4), 2))  # of the four pixels around a vertex
DECIMALS = 3
"""Of a coordinate in base pixels: a nanometre."""

Rings = list[np.ndarray]
"""The outline of a component: closed rings, the outer one first, each (n, 2) of x and y, int64 or float64."""


def _masks() -> np.ndarray:
    """(4, 64) uint8: the mask of the component of each of the four pixels, by which of _PAIRS are of one (six bits)."""
    alike = np.arange(1 << len(_PAIRS))
    masks = np.repeat(1 << np.arange(4)[:, None], len(alike), axis=1)
    for bit, (one, other) in enumerate(_PAIRS):
        masks[one] |= (alike >> bit & 1) << other
        masks[other] |= (alike >> bit & 1) << one
    return masks.astype(np.uint8)


_MASKS = _masks()
_FIRST = (_MASKS & (1 << np.arange(4)[:, None]) - 1) == 0  # no earlier pixel is of the same component
_BENDS = _FIRST & (_TURNS[_MASKS] > 0)


def find_corners(labels: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of all components of a block of pixels, and every vertex of theirs on the block's edge.

    `labels` is (rows, columns) uint8, and `ids` (rows, columns) int the component of each pixel, connected by the sides of
    pixels of one label, -1 where the label is IGNORED. Returns the component of each corner, (n,), ascending, and its (row,
    column, mask), (n, 3) int32, counted from the block's own corner.
    """
    may_turn = _may_turn(labels)
    vertices = np.flatnonzero(may_turn)  # many times faster than np.nonzero in two dimensions
    rows, columns = np.divmod(vertices.astype(np.int32), np.int32(may_turn.shape[1]))
    edge = (rows == 0) | (rows == ids.shape[0]) | (columns == 0) | (columns == ids.shape[1])
    around = np.pad(ids, 1, constant_values=-1)
    northwest, width = vertices + rows, around.shape[1]  # `around` is a pixel wider
    members = np.stack([around.ravel()[northwest + step] for step in (0, 1, width, width + 1)])
    alike = np.zeros(len(vertices), np.uint8)
    for bit, (one, other) in enumerate(_PAIRS):
        alike |= (members[one] == members[other]).view(np.uint8) << np.uint8(bit)
    kept = [
        np.flatnonzero((owner >= 0) & (bends[alike] | (edge & first[alike])))
        for owner, bends, first in zip(members, _BENDS, _FIRST, strict=True)
    ]
    owners = np.concatenate([owner[own] for owner, own in zip(members, kept, strict=True)])
    masks = np.concatenate([mask[alike[own]] for mask, own in zip(_MASKS, kept, strict=True)])
    # Numpy sorts 16 bits five times as fast, and few blocks have components that take more.
    order = np.argsort(owners.astype(np.min_scalar_type(ids.max())), kind="stable")
    at = np.concatenate(kept)[order]
    return owners[order], np.stack([rows[at], columns[at], masks[order].astype(np.int32)], axis=1)


def trace_rings(owners: np.ndarray, corners: np.ndarray, scale: tuple[float, float]) -> list[Rings]:
    """The rings of each component (connected by the sides of its pixels), in ascending order.

    `owners` (n,) and `corners` (n, 3) are as `find_corners` gives them, from one block or from many; `scale` multiplies
    x and y. The polygon that rings make is valid and has no needless vertices.
    """
    owners, rows, columns, down = _turns(owners, corners)
    vertical = _order(owners, columns, 2 * rows + down)
    partner = np.empty(len(owners), np.int64)
    partner[vertical[0::2]], partner[vertical[1::2]] = vertical[1::2], vertical[0::2]
    order, starts = _rings(partner)
    ring_owners = owners[order[starts]]
    polygon_starts = np.flatnonzero(np.diff(ring_owners, prepend=-1))
    closed = np.insert(order, np.append(starts[1:], len(order)), order[starts])
    points = np.stack([_scaled(columns[closed], scale[0]), _scaled(rows[closed], scale[1])], axis=1)
    ring_offsets = np.append(starts, len(order)) + np.arange(len(starts) + 1)
    rings = [points[start:stop] for start, stop in pairwise(ring_offsets.tolist())]
    return [rings[first:beyond] for first, beyond in pairwise([*polygon_starts.tolist(), len(rings)])]


def _scaled(places: np.ndarray, scale: float) -> np.ndarray:
    """Places in base pixels, rounded; whole numbers where all are, which are written in fewer bytes."""
    whole = round(scale)
    if abs(scale - whole) * places.max() < 0.5 * 10**-DECIMALS:
        return places * whole
    return np.asarray(np.round(places * scale, DECIMALS))


def _may_turn(labels: np.ndarray) -> np.ndarray:
    """(rows + 1, columns + 1) bool: vertices on the block's edge, and those at which labels change along both axes.

    Pixels side by side are of one component where their labels are alike, and labels have a quarter of the bytes.
    """
    turns = np.ones(tuple(size + 1 for size in labels.shape), bool)
    beside, below = labels[:, :-1] != labels[:, 1:], labels[:-1] != labels[1:]
    turns[1:-1, 1:-1] = (beside[:-1] | beside[1:]) & (below[:, :-1] | below[:, 1:])
    return turns


def _turns(owners: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every turn of every outline by (owner, row, column), pieces laid over each other; `down` if it leads downward.

    `down` tells apart the two turns at one vertex. The first of them leads to the left, the second to the right, so
    that along each row the turns, taken two by two, are the horizontal parts of the outline.
    """
    order = _order(owners, corners[:, 0], corners[:, 1])
    owners, (rows, columns, masks) = owners[order], corners[order].astype(np.int64).T
    new = (np.diff(owners, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0) | (np.diff(columns, prepend=-1) != 0)
    starts = np.flatnonzero(new)
    masks = np.bitwise_or.reduceat(masks, starts)
    turn = np.repeat(np.arange(len(starts)), _TURNS[masks])
    second = np.diff(turn, prepend=-1) == 0
    vertex = starts[turn]
    return owners[vertex], rows[vertex], columns[vertex], second ^ (masks[turn] == _NW_AND_SE)


def _rings(partner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The turns in the order of the outlines, and where in it each ring starts.

    Turn i is joined by a horizontal line to turn i ^ 1, by a vertical one to partner[i]. A ring starts at its first
    turn: the first ring of a component is the outer one. Going on from turn to turn leads round each ring in either
    direction; kept is the one that starts along the horizontal line. These rings are made one chain, which is walked.
    """
    turns = np.arange(len(partner))
    after = partner[turns ^ 1]
    count, ring = connected_components(_one_way(after), connection="strong")
    first = np.empty(count, np.int64)
    first[ring[::-1]] = turns[::-1]
    starts = np.sort(first[first % 2 == 0])
    before = np.empty_like(after)
    before[after] = turns
    after[before[starts]] = np.roll(starts, -1)
    entered = depth_first_order(_one_way(after), starts[0], return_predecessors=False).astype(np.int64)
    sizes = np.bincount(ring)[ring[starts]]
    return np.stack([entered, entered ^ 1], axis=1).ravel(), 2 * (np.cumsum(sizes) - sizes)


def _one_way(following: np.ndarray) -> csr_array:
    """The graph in which a single edge leads from i to following[i]."""
    return csr_array((np.ones(len(following)), following, np.arange(len(following) + 1)))


def _order(owners: np.ndarray, major: np.ndarray, minor: np.ndarray) -> np.ndarray:
    """What sorts by owner, then major, then minor: a single key, since most of it is in order already."""
    spans = int(major.max()) + 1, int(minor.max()) + 1
    key = (owners.astype(np.int64) * spans[0] + major) * spans[1] + minor
    return np.argsort(key, kind="stable")
