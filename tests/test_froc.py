"""Lesion FROC: lesions that are found, missed, merged or too small, the challenge's own code, and rates by hand."""

import numpy as np
import pytest
from monai.metrics.froc import compute_froc_curve_data
from scipy import ndimage
from skimage.measure import label, regionprops

from pipeline.froc import RATES, Detections, detect, resampled_froc, sensitivities
from pipeline.geometry import Mpp

MPP = Mpp(8.0, 8.0)
SHAPE = (300, 400)
PIXEL_UM = 0.243 * 2**5  # of the challenge's masks


def disc(row, column, radius):
    rows, columns = np.ogrid[: SHAPE[0], : SHAPE[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def levels(*discs):
    """255 times the probability: each (row, column, radius, level) over 10 everywhere else."""
    probability = np.full(SHAPE, 10, np.uint8)
    for row, column, radius, level in discs:
        probability[disc(row, column, radius)] = level
    return probability


def curve(*patients):
    """Sensitivities of some patients together."""
    return sensitivities(patients, np.ones((1, len(patients)), int))[0]


def found(truth, probability, min_area_um2=0.0):
    return detect(truth, probability > 127, probability, MPP, min_area_um2)


def test_lesions_found_and_missed_and_false_alarms():
    truth = disc(60, 60, 25) | disc(60, 300, 25) | disc(220, 120, 25)
    one = found(truth, levels((60, 60, 20, 250), (220, 125, 20, 200), (230, 330, 10, 180)))
    assert sorted(one.lesions) == pytest.approx([0, 200 / 255, 250 / 255])
    assert one.false == pytest.approx((180 / 255,))
    # 2 of 3 are found before the first false alarm: at no rate are there more
    np.testing.assert_allclose(curve(one), 2 / 3)


def test_sensitivity_grows_with_the_false_alarms_that_are_allowed():
    few = Detections(false=(0.9, 0.7), lesions=(0.95, 0.8, 0.6, 0.0), slides=1)
    # thresholds 0.95, 0.9, 0.8, 0.7, 0.6: rates 0, 1, 1, 2, 2 and sensitivities 1/4, 1/4, 1/2, 1/2, 3/4
    np.testing.assert_allclose(curve(few)[2:], [0.5, 0.75, 0.75, 0.75])
    np.testing.assert_allclose(curve(few)[:2], [0.25, 0.25])
    spread = Detections(few.false, few.lesions, slides=8)
    np.testing.assert_allclose(curve(spread), 0.75)  # at most a quarter of a false alarm a slide


def test_a_perfect_and_certain_prediction_scores_one():
    truth = disc(60, 60, 25) | disc(220, 120, 25)
    certain = np.where(truth, 255, 0).astype(np.uint8)
    assert curve(found(truth, certain)).mean() == 1
    assert curve(found(truth, np.zeros(SHAPE, np.uint8))).mean() == 0
    assert np.isnan(curve(found(np.zeros(SHAPE, bool), certain))).all()


def test_close_lesions_are_one_and_isolated_cells_are_none():
    near = disc(100, 100, 25) | disc(100, 158, 25)  # 56 um apart
    assert len(found(near, levels()).lesions) == 1
    apart = disc(100, 100, 25) | disc(100, 165, 25)  # 112 um
    assert len(found(apart, levels()).lesions) == 2
    small = found(disc(100, 100, 5), levels((100, 100, 5, 240)))
    assert small == Detections((), (), 1)  # neither to be found nor false


def test_a_detection_stands_where_it_is_surest():
    truth = disc(150, 150, 30)
    probability = levels((150, 190, 40, 150), (150, 215, 6, 230))  # reaches into the lesion, is surest outside
    assert len(found(truth, probability).false) == 1
    probability = levels((150, 190, 40, 150), (150, 160, 6, 230))
    assert found(truth, probability) == Detections((), (230 / 255,), 1)
    area_um2 = 64.0 * (probability > 127).sum()
    assert found(truth, probability, min_area_um2=area_um2) == Detections((), (230 / 255,), 1)
    assert found(truth, probability, min_area_um2=area_um2 + 1) == Detections((), (0.0,), 1)


def test_the_deepest_place_of_a_region_is_so_in_micrometres():
    prediction, truth = np.zeros((200, 160), bool), np.zeros((200, 160), bool)
    prediction[60:66, 20:70] = True  # 24 um high
    prediction[40:90, 100:104] = True  # 32 um wide, and there the lesion is
    prediction[62, 70:100] = True
    truth[30:110, 90:140] = True
    one = detect(truth, prediction, np.where(prediction, 200, 0).astype(np.uint8), Mpp(8.0, 4.0), 0.0)
    assert one == Detections((), (200 / 255,), 1)


def camelyon16(truth, prediction, probability, min_area_um2):
    """False positives and lesions as the challenge's evaluation code finds them; a region stands at its highest pixel."""
    near = ndimage.distance_transform_edt(~truth) < 75 / (PIXEL_UM * 2)
    mask = label(ndimage.binary_fill_holes(near), connectivity=2)
    lesions = {part.label: 0.0 for part in regionprops(mask) if part.axis_major_length >= 275 / PIXEL_UM}
    false = []
    for part in regionprops(label(prediction, connectivity=2)):
        if part.area * PIXEL_UM**2 >= min_area_um2:
            depth = ndimage.distance_transform_edt(np.pad(part.image, 1))[1:-1, 1:-1][part.image]
            heights = np.stack([probability[tuple(part.coords.T)] / 255, depth], axis=-1)
            top = max(heights.tolist())  # where several are as high, at the deepest of them
            (hit,) = set(mask[tuple(part.coords[(heights == top).all(axis=-1)].T)])  # seeds are such that it is one
            if hit == 0:
                false.append(top[0])
            elif hit in lesions:
                lesions[hit] = max(lesions[hit], top[0])
    return sorted(false), sorted(lesions.values())


@pytest.mark.parametrize("seed", range(11, 26))
def test_detections_are_those_of_the_challenge(seed):
    noise = np.random.default_rng(seed).normal(size=(2, 150, 190))
    coarse, fine = (field / field.std() for field in map(ndimage.gaussian_filter, noise, (12, 3)))
    truth = abs(coarse - 1.2) < 0.2  # bands, many of them closed
    probability = np.uint8(25 * np.clip(np.rint(5 + 2.5 * (coarse + fine)), 0, 10))
    one = detect(truth, probability > 127, probability, Mpp(PIXEL_UM, PIXEL_UM), 2000.0)
    assert (sorted(one.false), sorted(one.lesions)) == camelyon16(truth, probability > 127, probability, 2000.0)


def test_rounds_pool_the_slides_of_the_patients_that_are_drawn():
    good, bad = Detections((), (0.9, 0.8), 1), Detections((0.95, 0.9), (0.0,), 2)
    scores = resampled_froc([good, bad], np.array([[2, 0], [1, 1], [0, 2]]))
    assert scores.tolist() == [1, curve(Detections.gathered([good, bad])).mean(), 0]
    assert len(RATES) == 6


def monai_sensitivities(some):
    """Of what was found on some slides, from MONAI's curve."""
    if not some.lesions:
        return np.full(len(RATES), np.nan)
    false = np.array([0.0, *some.false])  # MONAI passes over the lowest probability: let it be none of a detection's
    rates, sensitivity = compute_froc_curve_data(false, np.array(some.lesions), len(some.lesions), some.slides)
    return np.interp(RATES, rates[::-1], sensitivity[::-1])


@pytest.mark.parametrize(("patients", "most", "lesions"), [(1, 0, 0), (4, 2, 0.2), (7, 3, 1), (6, 9, 2), (12, 40, 3)])
def test_every_round_is_the_curve_of_monai(patients, most, lesions):
    """To the bit, patients without lesions, slides or detections among them, and many detections as sure as one another."""
    rng, some = np.random.default_rng(patients), [Detections((), (), 0)]
    for _ in range(patients):
        false = rng.integers(120, 256, rng.integers(most + 1)) / 255
        hits = rng.integers(120, 256, rng.poisson(lesions)) * (rng.random() < 0.8) / 255
        some.append(Detections(tuple(false), tuple(hits), int(rng.integers(1, 4))))
    draws = rng.multinomial(len(some), np.full(len(some), 1 / len(some)), size=60)
    rounds = [[one for one, times in zip(some, row, strict=True) for _ in range(times)] for row in draws]
    expected = np.array([monai_sensitivities(Detections.gathered(drawn)) for drawn in rounds])
    np.testing.assert_array_equal(sensitivities(some, draws), expected)
    np.testing.assert_array_equal(resampled_froc(some, draws), [row.mean() for row in expected])
