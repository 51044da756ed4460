"""Overlap scores against slow references, known values, and a bootstrap small enough to enumerate."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.bootstrap import bounds, draw_patients
from pipeline.classes import IGNORED, Class, Classes
from pipeline.errors import CohortError
from pipeline.geometry import Mpp
from pipeline.metrics import SCORES, SlideConfusion, confusion, few_patients, interval, ratios, report, table

MPP = Mpp(0.5, 0.25)
PAIR = Classes((Class("rest", (0, 0, 0)), Class("gland", (255, 0, 0))))


def slow_confusion(truth, prediction, classes):
    counts = np.zeros((classes, classes + 1), np.int64)
    for true, called in zip(truth.flat, prediction.flat, strict=True):
        if true != IGNORED:
            counts[true, classes if called == IGNORED else called] += 1
    return counts


def slow_scores(truth, prediction, index, rest):
    """Set arithmetic on pixel numbers, as the definitions have it."""
    known = {i for i, value in enumerate(truth.flat) if value != IGNORED}
    answers = [rest if value == IGNORED and rest is not None else value for value in prediction.flat]
    true = {i for i in known if truth.flat[i] == index}
    called = {i for i in known if answers[i] == index}
    both = len(true & called)
    return {
        "dice": 2 * both / (len(true) + len(called)) if true or called else math.nan,
        "iou": both / len(true | called) if true or called else math.nan,
        "precision": both / len(called) if called else math.nan,
        "recall": both / len(true) if true else math.nan,
    }


def pair(hit, false, miss, right_rest=0, rest_unexamined=0, gland_unexamined=0):
    """The confusion of (rest, gland)."""
    return np.array([[right_rest, false, rest_unexamined], [miss, hit, gland_unexamined]], np.int64)


def slides(*cells):
    return [SlideConfusion(f"s{i}", patient, split, counts) for i, (patient, split, counts) in enumerate(cells)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 9),
    width=st.integers(1, 13),
    classes=st.integers(1, 4),
    with_rest=st.booleans(),
)
def test_counts_and_scores_agree_with_loops_over_pixels(seed, height, width, classes, with_rest):
    rng = np.random.default_rng(seed)
    values = np.array([*range(classes), IGNORED], np.uint8)
    truth, prediction = rng.choice(values, (height, width)), rng.choice(values, (height, width))
    rest = int(rng.integers(classes)) if with_rest else None
    counts = confusion(truth, prediction, classes)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, slow_confusion(truth, prediction, classes))
    found = ratios(counts, rest)
    for index in range(classes):
        slow = slow_scores(truth, prediction, index, rest)
        for name in SCORES:
            np.testing.assert_allclose(found[name][index], slow[name], rtol=1e-12, equal_nan=True)


def test_a_confusion_is_the_sum_of_its_parts_however_large():
    rng = np.random.default_rng(3)
    truth = rng.choice(np.array([0, 1, 2, IGNORED], np.uint8), (3000, 2100))  # more than one block of counting
    prediction = rng.choice(np.array([0, 1, 2, IGNORED], np.uint8), (3000, 2100))
    whole = confusion(truth, prediction, 3)
    assert whole.sum() == (truth != IGNORED).sum()
    parts = [confusion(truth[a:b], prediction[a:b], 3) for a, b in [(0, 7), (7, 1999), (1999, 3000)]]
    np.testing.assert_array_equal(whole, sum(parts))
    np.testing.assert_array_equal(whole, confusion(truth.T, prediction.T, 3))
    for true, called in itertools.product(range(3), range(3)):
        assert whole[true, called] == ((truth == true) & (prediction == called)).sum()


def test_the_example_at_the_top_of_the_module():
    counts = np.array([[90, 4, 20], [5, 70, 3]])
    scores = ratios(counts, rest=0)
    assert scores["recall"][0] == 110 / 114  # not examined is right on background
    assert scores["precision"][0] == 110 / 118  # and 3 gland pixels were answered with it
    assert scores["recall"][1] == 70 / 78
    assert scores["precision"][1] == 70 / 74
    without = ratios(counts)
    assert without["recall"][0] == 90 / 114  # a miss where no class is the background
    assert without["precision"][0] == 90 / 95
    np.testing.assert_array_equal(without["dice"][1], scores["dice"][1])
    np.testing.assert_allclose(scores["iou"], scores["dice"] / (2 - scores["dice"]))
    np.testing.assert_array_equal(counts, [[90, 4, 20], [5, 70, 3]])  # the input is left alone


def test_two_discs_have_the_dice_of_their_areas():
    y, x = np.mgrid[:400, :600]
    truth = ((x - 300) ** 2 + (y - 200) ** 2 < 150**2).astype(np.uint8)
    inner = ((x - 300) ** 2 + (y - 200) ** 2 < 75**2).astype(np.uint8)
    scores = ratios(confusion(truth, inner, 2))
    assert scores["dice"][1] == pytest.approx(0.4, abs=0.002)  # 2 * 1/4 / (1 + 1/4)
    assert scores["iou"][1] == pytest.approx(0.25, abs=0.002)
    assert scores["precision"][1] == 1
    assert scores["recall"][1] == pytest.approx(0.25, abs=0.002)


def test_absent_classes_have_no_score_and_a_wrong_guess_has_zero():
    truth, prediction = np.zeros((4, 7), np.uint8), np.zeros((4, 7), np.uint8)
    scores = ratios(confusion(truth, prediction, 2))
    assert all(np.isnan(scores[name][1]) for name in SCORES)
    assert all(scores[name][0] == 1 for name in SCORES)
    prediction[0, 0] = 1
    scores = ratios(confusion(truth, prediction, 2))
    assert (scores["dice"][1], scores["iou"][1], scores["precision"][1]) == (0, 0, 0)
    assert np.isnan(scores["recall"][1])


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(5, 3\)"):
        confusion(np.zeros((3, 5), np.uint8), np.zeros((5, 3), np.uint8), 2)
    truth, prediction = np.zeros((3, 5), np.uint8), np.zeros((3, 5), np.uint8)
    truth[0, 0], prediction[2, 4] = 7, 2
    with pytest.raises(ValueError, match=r"below 2 or 255, found \[2, 7\]"):
        confusion(truth, prediction, 2)
    truth[:] = IGNORED  # nothing is known, so whatever was predicted does not matter
    assert confusion(truth, prediction, 2).sum() == 0


def test_the_bootstrap_finds_the_percentiles_of_all_possible_rounds():
    areas = [(90, 10, 30), (40, 30, 5), (10, 0, 60), (300, 80, 90), (70, 20, 9), (200, 5, 80)]
    patients = np.stack([pair(*area) for area in areas])
    scores = ratios(patients[np.array(list(itertools.product(range(6), repeat=6)))].sum(axis=1))
    low = stats.norm.cdf(-math.sqrt(6 / 5) * stats.t.ppf(0.975, 5))
    for name, found in interval(patients, samples=60000, seed=1).items():
        for bound, share in zip(found[:, 1], (low, 1 - low), strict=True):
            assert (scores[name][:, 1] < bound).mean() - 0.001 < share < (scores[name][:, 1] <= bound).mean() + 0.001


def share_of_intervals_that_hold(truth, right, whole):
    """How often bounds of the pooled right / whole of (trials, patients) hold what is true of all patients."""
    draws = draw_patients(right.shape[1], 1000, seed=0)
    low, high = bounds((draws @ right.T) / (draws @ whole.T), (right / whole).T)
    return np.mean((low <= truth) & (truth <= high))


@pytest.mark.parametrize(
    ("patients", "mean", "ratio"),
    [(2, 0.50, 0.49), (6, 0.93, 0.91), (9, 0.94, 0.92), (15, 0.94, 0.92)],
)
def test_intervals_hold_what_is_true_as_often_as_is_said(patients, mean, ratio):
    rng, shape = np.random.default_rng(patients), (2000, patients)
    areas = rng.lognormal(0, 1, shape)
    for said, truth, right, whole in (
        (mean, 0.0, rng.normal(0, 1, shape), np.ones(shape)),
        (ratio, 0.8, areas * rng.beta(8, 2, shape), areas),
    ):
        assert share_of_intervals_that_hold(truth, right, whole) == pytest.approx(said, abs=0.025)


def test_a_split_of_few_patients_says_that_its_interval_is_none_of_95_percent():
    counts = {"enough": 6, "few": 5, "one": 1}  # one has no interval
    rows = slides(*((f"p{n}", split, pair(8, 1, 1)) for split, patients in counts.items() for n in range(patients)))
    told = "few: intervals over too few patients for 95 %, which takes 6: rest (5: 94 % at best), gland (5: 94 % at best)"
    assert few_patients(report(rows, PAIR, MPP)) == [told]


def test_two_patients_make_three_rounds_so_the_interval_spans_both():
    low, high = pair(50, 50, 50), pair(90, 10, 10)
    bounds = interval(np.stack([low, high]), seed=0)["dice"][:, 1]
    np.testing.assert_allclose(bounds, [0.5, 0.9])


def test_one_patient_has_no_interval():
    bounds = interval(pair(9, 1, 1)[None])
    assert all(np.isnan(values).all() and values.shape == (2, 2) for values in bounds.values())


def test_rounds_without_a_class_do_not_count_against_it():
    with_gland, without = pair(80, 20, 20, right_rest=5), pair(0, 0, 0, right_rest=9)
    bounds = interval(np.stack([with_gland, with_gland, without]))["dice"]
    np.testing.assert_allclose(bounds[:, 1], [0.8, 0.8])
    for few in ([with_gland, without, without], [without, without]):
        assert np.isnan(interval(np.stack(few))["dice"][:, 1]).all()


def test_slides_of_one_patient_are_drawn_together():
    good, bad, other = pair(99, 1, 1), pair(10, 90, 90), pair(60, 40, 40)
    apart = report(slides(("a", "val", good), ("b", "val", bad), ("c", "val", other)), PAIR, MPP)["val"]["pooled"]
    together = report(slides(("a", "val", good), ("a", "val", bad), ("c", "val", other)), PAIR, MPP)["val"]["pooled"]
    assert together["gland"]["dice"] == apart["gland"]["dice"]
    assert (together["gland"]["patients"], apart["gland"]["patients"]) == (2, 3)
    summed = np.stack([good + bad, other])
    np.testing.assert_allclose(
        [together["gland"]["dice_low"], together["gland"]["dice_high"]], interval(summed)["dice"][:, 1]
    )
    assert together["gland"]["dice_high"] < apart["gland"]["dice_high"]


def test_a_report_pools_counts_and_keeps_splits_apart():
    rows = slides(("a", "train", pair(10, 0, 0)), ("b", "val", pair(80, 20, 20)), ("c", "val", pair(1, 9, 9)))
    scores = report(rows, PAIR, MPP)
    assert {split: list(part) for split, part in scores.items()} == {
        "train": ["pooled", "s0"],
        "val": ["pooled", "s1", "s2"],
    }
    gland = scores["val"]["pooled"]["gland"]
    assert gland["dice"] == pytest.approx(2 * 81 / (2 * 81 + 29 + 29))  # of the sums, not the mean of 0.8 and 0.1
    assert gland["pixels"] == 110
    assert gland["area_mm2"] == pytest.approx(110 * 0.125 / 1e6)
    assert scores["val"]["s2"]["gland"]["dice"] == pytest.approx(0.1)
    assert scores["val"]["s2"]["gland"]["dice_low"] is None
    assert scores["train"]["pooled"]["gland"]["dice_low"] is None  # one patient


def test_a_report_is_valid_json_and_the_same_for_one_seed():
    rows = slides(("a", "val", pair(0, 0, 0, right_rest=5)), ("b", "val", pair(0, 0, 0, right_rest=8)))
    scores = report(rows, PAIR, MPP, seed=4)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert scores["val"]["pooled"]["gland"]["dice"] is None
    assert scores["val"]["pooled"]["rest"]["dice"] == 1
    rng = np.random.default_rng(0)
    many = slides(*[(f"p{i}", "val", rng.integers(0, 99, (2, 3))) for i in range(9)])
    assert report(many, PAIR, MPP, seed=4) == report(many, PAIR, MPP, seed=4)
    assert report(many, PAIR, MPP, seed=4) != report(many, PAIR, MPP, seed=5)


def test_not_examined_background_is_right_in_a_report_that_names_it():
    rows = slides(("a", "val", pair(70, 4, 5, right_rest=90, rest_unexamined=20, gland_unexamined=3)))
    assert report(rows, PAIR, MPP, rest=0)["val"]["s0"]["rest"]["recall"] == 110 / 114
    assert report(rows, PAIR, MPP)["val"]["s0"]["rest"]["recall"] == 90 / 114
    missed = (pair(70, 4, 5, right_rest=90, rest_unexamined=20), pair(9, 2, 1, right_rest=50, rest_unexamined=70))
    rows = slides(*((f"p{n}", "val", counts) for n, counts in enumerate(missed)))
    found = report(rows, PAIR, MPP, rest=0)["val"]["pooled"]["rest"]
    low, high = interval(np.stack(missed), rest=0)["recall"][:, 0]
    assert (found["recall_low"], found["recall_high"]) == (low, high)
    assert low <= found["recall"] <= high


def test_names_that_would_hide_each_other_are_refused():
    for first, second in [("pooled", "s1"), ("s1", "s1")]:
        rows = [SlideConfusion(name, "a", "val", pair(1, 1, 1)) for name in (first, second)]
        with pytest.raises(CohortError, match="split val"):
            report(rows, PAIR, MPP)


def test_the_table_has_a_row_for_every_split_slide_and_class():
    rows = slides(("a", "val", pair(8, 2, 2)), ("b", "test", pair(8, 2, 2)))
    flat = table(report(rows, PAIR, MPP))
    assert [(row["split"], row["slide"], row["class"]) for row in flat] == [
        (split, slide, name) for split, slide in [("val", "pooled"), ("val", "s0"), ("test", "pooled"), ("test", "s1")]
        for name in ("rest", "gland")
    ]  # fmt: skip
    assert flat[1]["dice"] == pytest.approx(0.8)
    assert list(flat[0])[3:7] == ["dice", "dice_low", "dice_high", "iou"]


def test_a_class_that_one_patient_has_rests_on_one_patient():
    with_gland, without = pair(80, 20, 20, right_rest=5), pair(0, 0, 0, right_rest=9)
    rows = [
        SlideConfusion(name, name, "test", counts) for name, counts in (("a", with_gland), ("b", without), ("c", without))
    ]
    found = report(rows, PAIR, MPP)["test"]["pooled"]
    assert found["gland"]["patients"] == 1 and found["gland"]["dice"] == 0.8
    assert found["gland"]["dice_low"] is None and found["gland"]["recall_high"] is None
    assert found["rest"]["patients"] == 3 and found["rest"]["dice_low"] < found["rest"]["dice_high"]


def test_a_pixel_that_is_invented_on_patients_without_a_class_is_none_to_rest_an_interval_on():
    """Of ten patients three have gland; on the others nothing is called so, or a pixel of each."""
    have = [pair(100 * hit, 1000, 10000 - 100 * hit, right_rest=10**5) for hit in (95, 80, 60)]
    reports = []
    for invented in (0, 1):
        others = [pair(0, invented, 0, right_rest=10**5 - invented)] * 7
        rows = slides(*((f"p{number}", "test", counts) for number, counts in enumerate([*have, *others])))
        reports.append(report(rows, PAIR, MPP, rest=0))
        assert few_patients(reports[-1])[0].endswith("takes 6: gland (3: 75 % at best)")
    clean, noisy = (each["test"]["pooled"]["gland"] for each in reports)
    assert clean["patients"] == noisy["patients"] == 3
    for score in SCORES:
        for bound in (f"{score}_low", f"{score}_high"):
            assert noisy[bound] == pytest.approx(clean[bound], abs=0.002) and noisy[bound] > 0.4
    nobody = report(slides(*((f"p{n}", "test", pair(0, 5, 0, right_rest=9)) for n in range(8))), PAIR, MPP)["test"]["pooled"]
    assert (nobody["gland"]["patients"], nobody["gland"]["precision"], nobody["gland"]["precision_low"]) == (0, 0, None)
