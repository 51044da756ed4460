"""Differences between two examinations of the same patients, and the counts that they are taken from."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.comparison import paired_difference
from pipeline.errors import CohortError
from pipeline.metrics import SlideConfusion
from pipeline.tally import Tally, read_tally, write_tally


def test_a_difference_that_each_patient_shows_is_certain_and_what_patients_have_of_their_own_does_not_count() -> None:
    first = {"easy": 0.95, "hard": 0.40, "middling": 0.70, "only here": 0.1}
    second = {name: dice + 0.02 for name, dice in first.items() if name != "only here"}
    found = paired_difference(first, second)
    assert found.patients == ("easy", "hard", "middling")
    assert found.low is not None and found.high is not None
    np.testing.assert_allclose([found.mean, found.low, found.high], 0.02)


def test_the_interval_is_that_of_the_rounds_drawn_one_by_one() -> None:
    rng = np.random.default_rng(5)
    first = {str(number): float(rng.random()) for number in range(12)}
    second = {name: dice + float(rng.normal(0.05, 0.1)) for name, dice in first.items()}
    found = paired_difference(first, second, samples=4000)
    differences = [second[name] - first[name] for name in first]
    slow = [np.mean(rng.choice(differences, len(differences))) for _ in range(4000)]
    assert found.low is not None and found.high is not None
    np.testing.assert_allclose([found.low, found.high], np.percentile(slow, [2.5, 97.5]), atol=0.01)


def test_one_patient_has_no_interval_and_none_is_an_error() -> None:
    found = paired_difference({"a": 0.5}, {"a": 0.75})
    assert (found.mean, found.low, found.high) == (0.25, None, None)
    with pytest.raises(ValueError, match="share no patient"):
        paired_difference({"a": 0.5}, {"b": 0.5})


def test_a_tally_comes_back_and_sums_the_slides_of_a_patient(tmp_path: Path) -> None:
    one, two = np.array([[6, 2, 0], [1, 3, 1]]), np.array([[9, 0, 1], [0, 0, 0]])
    rows = (
        SlideConfusion("s1", "p", "val", one),
        SlideConfusion("s2", "p", "val", two),
        SlideConfusion("s3", "q", "val", two),
    )
    write_tally(tmp_path / "confusions.json", Tally(("Rest", "Gland"), 0, 0.5, rows))
    found = read_tally(tmp_path / "confusions.json")
    assert (found.classes, found.rest, found.mpp) == (("Rest", "Gland"), 0, 0.5)
    assert [(row.slide_id, row.patient, row.split) for row in found.rows] == [
        ("s1", "p", "val"),
        ("s2", "p", "val"),
        ("s3", "q", "val"),
    ]
    assert found.dice("Gland") == {"p": 2 * 3 / (2 * 3 + 2 + 2)}  # q has no gland at all
    assert found.dice("Rest")["q"] == 1.0  # what was not examined counts as background


def test_a_damaged_tally_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "confusions.json").write_text('{"classes": ["a"]')
    with pytest.raises(CohortError, match="fullfield evaluate"):
        read_tally(tmp_path / "confusions.json")
