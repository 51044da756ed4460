"""HD95 and NSD: shifted shapes whose distances are known, a slow reference, pooling, and MONAI's own."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pipeline.boundaries import Boundaries, hd95, measure_boundaries, surface_dice
from pipeline.geometry import Mpp

MPP = Mpp(0.5, 0.5)
ONCE = np.ones((1, 1), np.int64)


def disc(shape, row, column, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def score(parts, draws=ONCE):
    return float(hd95(parts, draws)[0]), float(surface_dice(parts, draws)[0])


def outline(mask, known):
    """Pixels of a mask beside a known pixel that is not of it, one by one."""
    places = []
    for row, column in np.argwhere(mask):
        beside = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        inside = [place for place in beside if 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]]
        if any(known[place] and not mask[place] for place in inside):
            places.append((row, column))
    return np.array(places, float).reshape(-1, 2)


@pytest.mark.parametrize("shift", [3, 8, 15])
def test_discs_that_are_shifted_lie_as_far_apart_as_the_shift(shift):
    truth, prediction = disc((140, 180), 70, 80, 60), disc((140, 180), 70, 80 + shift, 60)
    known = np.ones_like(truth)
    assert score([measure_boundaries(truth, prediction, known, MPP, 0.1)])[0] == pytest.approx(shift * 0.5, abs=0.1)
    assert score([measure_boundaries(truth, prediction, known, MPP, shift * 0.5)])[1] == 1


def test_discs_that_grow_lie_as_far_apart_as_their_radii():
    inner, outer = disc((160, 200), 80, 90, 40), disc((160, 200), 80, 90, 52)
    distance, dice = score([measure_boundaries(inner, outer, np.ones_like(inner), MPP, 5.0)])
    assert distance == pytest.approx(6.0, abs=0.3)
    assert dice == 0
    assert score([measure_boundaries(inner, outer, np.ones_like(inner), MPP, 6.5)])[1] == 1


def test_a_slow_reference_agrees_where_part_is_not_known():
    rng = np.random.default_rng(2)
    mpp = Mpp(0.5, 0.8)
    for _ in range(12):
        known = np.kron(rng.random((5, 7)) < 0.8, np.ones((6, 6))).astype(bool)
        truth, prediction = (disc(known.shape, *rng.integers(5, 25, 2), rng.integers(4, 10)) & known for _ in range(2))
        one, other = outline(truth, known) * [mpp.y, mpp.x], outline(prediction, known) * [mpp.y, mpp.x]
        if not len(one) or not len(other):
            continue
        apart = cdist(one, other)
        there, back = apart.min(axis=1), apart.min(axis=0)
        slow = max(np.percentile(part, 95, method="inverted_cdf") for part in (there, back))
        within = ((there <= 2.0).sum() + (back <= 2.0).sum()) / (len(there) + len(back))
        found = score([measure_boundaries(truth, prediction, known, mpp, 2.0)])
        assert found[0] == pytest.approx(slow, rel=0.006)
        assert found[1] == pytest.approx(within)


def test_monai_finds_the_same():
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    truth, prediction = disc((90, 110), 40, 50, 25), disc((90, 110), 46, 58, 21)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    options = {"include_background": True, "spacing": 0.5}
    distance, dice = score([measure_boundaries(truth, prediction, np.ones_like(truth), MPP, 2.5)])
    assert distance == pytest.approx(compute_hausdorff_distance(*tensors, percentile=95, **options).item(), rel=0.02)
    assert dice == pytest.approx(compute_surface_dice(*tensors, class_thresholds=[2.5], **options).item(), abs=1e-6)


def test_a_class_cut_off_by_what_is_known_has_no_boundary_there():
    mask = np.zeros((30, 50), bool)
    mask[:, :20] = True
    found = measure_boundaries(mask, mask, np.ones_like(mask), MPP, 1.0)
    assert found.from_truth.length.sum() == pytest.approx(30 * 0.5)
    known = np.zeros_like(mask)
    known[:, :20] = True
    assert measure_boundaries(mask, mask, known, MPP, 1.0).length == 0


def test_what_is_missed_is_as_far_as_the_field_allows_and_nothing_has_no_score():
    truth, nothing = disc((40, 60), 20, 30, 9), np.zeros((40, 60), bool)
    found = measure_boundaries(truth, nothing, np.ones_like(truth), MPP, 3.0)
    assert score([found]) == (pytest.approx(np.hypot(20, 30), rel=0.01), 0)
    found = measure_boundaries(truth, nothing, np.ones_like(truth), Mpp(0.5, 2.0), 3.0)
    assert score([found])[0] == pytest.approx(np.hypot(60 * 0.5, 40 * 2.0), rel=0.01)
    assert np.isnan(score([measure_boundaries(nothing, nothing, np.ones_like(truth), MPP, 3.0)])).all()


def test_what_is_missed_in_a_field_smaller_than_the_tolerance_is_missed():
    truth = np.zeros((6, 8), bool)
    truth[2:4, 2:4] = True
    found = measure_boundaries(truth, np.zeros_like(truth), np.ones_like(truth), Mpp(0.5, 0.5), 6.0)
    assert surface_dice([found], np.ones((1, 1), int)) == 0


def test_pooled_distances_are_those_of_all_patients_as_often_as_they_are_drawn():
    rng = np.random.default_rng(8)
    shape = (70, 90)
    known = np.ones(shape, bool)
    pairs = [(disc(shape, 33, 40, 20), disc(shape, 33, 40 + k, 20 + rng.integers(4))) for k in (1, 5, 9)]
    parts = [measure_boundaries(*pair, known, MPP, 2.0) for pair in pairs]
    draws = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
    for drawn, distance, dice in zip(draws, hd95(parts, draws), surface_dice(parts, draws), strict=True):
        repeated = [part for part, times in zip(parts, drawn, strict=True) for _ in range(times)]
        assert (distance, dice) == pytest.approx(score([Boundaries.gathered(repeated)]))


@pytest.mark.parametrize("mpp", [0.25, 0.7, 1.8])
def test_a_boundary_that_is_off_by_the_tolerance_is_right_wherever_it_lies(mpp):
    for row in range(10, 60):
        truth, known = np.zeros((90, 40), bool), np.ones((90, 40), bool)
        truth[row : row + 12] = True
        one = measure_boundaries(truth, np.roll(truth, 2, axis=0), known, Mpp(mpp, mpp), 2 * mpp)
        assert surface_dice([one], ONCE)[0] == 1
        less = measure_boundaries(truth, np.roll(truth, 3, axis=0), known, Mpp(mpp, mpp), 2 * mpp)
        assert surface_dice([less], ONCE)[0] == 0
