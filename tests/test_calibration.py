"""Calibration: probabilities that keep their word, such that do not, and the bins' edges."""

import numpy as np
import pytest
from PIL import Image

from pipeline.calibration import BINS, calibration_error, count_reliability, draw_reliability, reliability_rows
from pipeline.classes import IGNORED


def said(level, right, shape=(300, 400), seed=0):
    """Truth, labels, probabilities of two classes: class 1 is called with `level` of 255, and right in a share `right`."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(shape) < right).astype(np.uint8)
    probabilities = np.stack([np.full(shape, 255 - level), np.full(shape, level)]).astype(np.uint8)
    return truth, np.ones(shape, np.uint8), probabilities


def test_probabilities_that_keep_their_word_have_no_error():
    counts = sum(count_reliability(*said(level, level / 255, seed=level)) for level in range(130, 256, 5))
    assert calibration_error(counts)[1] < 0.005
    assert np.isnan(calibration_error(counts)[0])  # never called


def test_the_error_is_how_far_the_word_is_from_the_truth():
    counts = count_reliability(*said(230, 0.6))
    assert calibration_error(counts.sum(axis=0)) == pytest.approx(230 / 255 - 0.6, abs=0.005)
    both = counts + count_reliability(*said(140, 1.0))
    expected = (230 / 255 - 0.6 + 1 - 140 / 255) / 2
    assert calibration_error(both.sum(axis=0)) == pytest.approx(expected, abs=0.005)


def test_every_pixel_is_in_the_bin_of_its_probability():
    rng = np.random.default_rng(1)
    probabilities = rng.integers(0, 256, (3, 40, 70)).astype(np.uint8)
    labels = probabilities.argmax(axis=0).astype(np.uint8)
    truth = rng.choice(np.array([0, 1, 2, IGNORED], np.uint8), labels.shape)
    labels[:3] = IGNORED
    counts = count_reliability(truth, labels, probabilities)
    slow = np.zeros((3, BINS, 3), np.int64)
    for place in np.argwhere((truth != IGNORED) & (labels != IGNORED)):
        true, called = truth[tuple(place)], labels[tuple(place)]
        level = int(probabilities[:, *place].max())
        slow[called, max(-(-level * BINS // 255) - 1, 0)] += [1, level, true == called]
    np.testing.assert_array_equal(counts, slow)


@pytest.mark.filterwarnings("error")
def test_the_table_and_the_picture(tmp_path):
    counts = count_reliability(*said(230, 0.6)).sum(axis=0)
    rows = reliability_rows(counts)
    filled = [row for row in rows if row["pixels"]]
    assert len(rows) == BINS and len(filled) == 1
    assert filled[0]["above"] < 230 / 255 <= filled[0]["up_to"]
    assert filled[0]["mean_probability"] == pytest.approx(230 / 255)
    assert filled[0]["accuracy"] == pytest.approx(0.6, abs=0.005)
    draw_reliability(
        tmp_path / "reliability.png", {"val": counts, "test": np.zeros_like(counts)}, {"val": 0.3, "test": None}
    )
    drawn = np.asarray(Image.open(tmp_path / "reliability.png").convert("RGB")).astype(int)
    assert (np.ptp(drawn, axis=-1) > 60).sum() > 50  # a coloured line
    assert [path.name for path in tmp_path.iterdir()] == ["reliability.png"]
