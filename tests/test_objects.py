"""Scores of objects against the challenge's formulas written out over pixel sets, and against cases one can see through."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from skimage.measure import label

from pipeline.geometry import Mpp
from pipeline.objects import CALLED_COUNT, MATCHED, OBJECT_SCORES, TRUE_COUNT, delivered, object_scores, object_sums

MPP = Mpp(0.5, 0.8)


def slow_scores(truth, prediction, mpp, min_area_um2=0.0, edge=None):
    """F1, object Dice and object Hausdorff, loop by loop, with every pixel of every pair."""
    prediction, regions = prediction.copy(), label(prediction, connectivity=1)
    for number in range(1, regions.max() + 1):
        region = regions == number
        if region.sum() * mpp.x * mpp.y < min_area_um2 and (edge is None or not (region & edge).any()):
            prediction[region] = False

    def objects(mask):
        labels = label(mask, connectivity=2)
        return [np.argwhere(labels == number) for number in range(1, labels.max() + 1)]

    def shared(one, other):
        return len({tuple(place) for place in one} & {tuple(place) for place in other})

    def hausdorff(one, other):
        apart = cdist(one * [mpp.y, mpp.x], other * [mpp.y, mpp.x])
        return max(apart.min(axis=0).max(), apart.min(axis=1).max())

    true, called = objects(truth), objects(prediction)
    if not true and not called:
        return dict.fromkeys(OBJECT_SCORES, np.nan)
    matched, dice, distances = 0, [], []
    for own, others in ((true, called), (called, true)):
        weights = np.array([len(one) for one in own]) / max(sum(len(one) for one in own), 1)
        dices, far = [], []
        for one in own:
            common = [shared(one, other) for other in others]
            if any(common):
                best = int(np.argmax(common))
                dices.append(2 * common[best] / (len(one) + len(others[best])))
                far.append(hausdorff(one, others[best]))
                matched += own is called and common[best] > len(others[best]) / 2
            else:
                dices.append(0.0)
                diagonal = np.hypot(truth.shape[0] * mpp.y, truth.shape[1] * mpp.x)
                far.append(min([hausdorff(one, other) for other in others], default=diagonal))
        dice.append(weights @ dices if own else 0.0)
        distances += [weights @ far] if own else []
    f1 = 2 * matched / (len(true) + len(called))
    return {"object_f1": f1, "object_dice": np.mean(dice), "object_hausdorff_um": np.mean(distances)}


def scores(truth, prediction, mpp=MPP):
    return object_scores(object_sums(truth, prediction, mpp))


def disc(shape, row, column, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 18),
    width=st.integers(1, 24),
    share=st.sampled_from([0.0, 0.1, 0.4, 0.7]),
    min_area_um2=st.sampled_from([0.0, 1.3]),
)
def test_scores_agree_with_the_formulas_over_all_pixels(seed, height, width, share, min_area_um2):
    rng = np.random.default_rng(seed)
    truth = rng.random((height, width)) < share
    prediction = np.where(rng.random((height, width)) < 0.6, truth, rng.random((height, width)) < rng.random() / 2)
    edge = rng.random((height, width)) < 0.05
    found = scores(truth, delivered(prediction, edge, MPP, min_area_um2))
    slow = slow_scores(truth, prediction, MPP, min_area_um2, edge)
    for name in OBJECT_SCORES:
        np.testing.assert_allclose(found[name], slow[name], rtol=1e-9, equal_nan=True, err_msg=name)


def test_rings_and_bays_are_measured_over_pixels_and_not_outlines():
    shape = (60, 80)
    full, ring = disc(shape, 30, 35, 22), disc(shape, 30, 35, 22) & ~disc(shape, 30, 35, 15)
    bay = full & ~np.pad(np.ones((30, 12), bool), ((0, 30), (29, 39)))
    for truth, prediction in [(full, ring), (ring, full), (full, bay), (ring, bay)]:
        found, slow = scores(truth, prediction), slow_scores(truth, prediction, MPP)
        assert found["object_hausdorff_um"] == pytest.approx(slow["object_hausdorff_um"])
        assert found["object_hausdorff_um"] > 3


def test_a_perfect_prediction():
    truth = disc((50, 70), 20, 20, 9) | disc((50, 70), 30, 55, 12)
    found = scores(truth, truth)
    assert (found["object_f1"], found["object_dice"], found["object_hausdorff_um"]) == (1, 1, 0)


def test_merged_split_missed_and_invented_objects():
    shape = (40, 120)
    left, right = disc(shape, 20, 20, 10), disc(shape, 20, 45, 10)
    bridge = np.zeros(shape, bool)
    bridge[19:22, 20:45] = True
    far = disc(shape, 20, 100, 8)
    assert scores(left | right, left | right | bridge)["object_f1"] == pytest.approx(2 / 3)  # one of two found
    assert scores(left | right, left)["object_f1"] == pytest.approx(2 / 3)
    assert scores(left, left | far)["object_f1"] == pytest.approx(2 / 3)
    halves = left.copy()
    halves[20] = False
    assert scores(left, halves)["object_f1"] == 0  # neither half covers more than half
    missed = scores(left, np.zeros(shape, bool))
    assert (missed["object_f1"], missed["object_dice"]) == (0, 0)
    assert missed["object_hausdorff_um"] == pytest.approx(np.hypot(40 * MPP.y, 120 * MPP.x))
    apart = scores(left, far)  # no overlap: the distance to the closest one
    assert apart["object_hausdorff_um"] == pytest.approx(slow_scores(left, far, MPP)["object_hausdorff_um"])


def test_sums_of_fields_are_those_of_fields_laid_side_by_side():
    rng = np.random.default_rng(4)
    fields = [(disc((30, 40), 15, 18, 9), disc((30, 40), 16, 20, rng.integers(5, 12))) for _ in range(3)]
    together = sum(object_sums(truth, prediction, MPP) for truth, prediction in fields)
    truth, prediction = (np.concatenate(masks, axis=1) for masks in zip(*fields, strict=True))
    np.testing.assert_allclose(together, object_sums(truth, prediction, MPP))


def test_touching_by_a_corner_is_one_object_and_specks_are_left_out_of_the_prediction_alone():
    truth = np.zeros((12, 20), bool)
    truth[2:5, 2:5] = truth[5:8, 5:8] = True
    assert object_sums(truth, truth, MPP)[1] == 1
    truth[10, 15] = True
    assert object_sums(truth, truth, MPP)[1] == 2
    called = delivered(truth, np.zeros_like(truth), MPP, 1.0)
    found = object_sums(truth, called, MPP)
    assert (found[TRUE_COUNT], found[CALLED_COUNT], found[MATCHED]) == (2, 1, 1)
    assert scores(truth, called)["object_f1"] == pytest.approx(2 / 3)  # the speck is missed
    assert not delivered(truth, np.zeros_like(truth), MPP, 4.0).any()  # of 9 px, 3.6 um2, each of what touches by a corner
