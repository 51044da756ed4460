"""Folds: whole patients, each held out once, and as much of every class in each fold as can be."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cohort import Case
from pipeline.errors import CohortError
from pipeline.folds import deal_folds, fold_cases

extents = st.lists(st.floats(0, 1e6), min_size=3, max_size=3).map(np.array)
cohorts = st.lists(extents, min_size=4, max_size=14).map(
    lambda rows: {f"P{number:02d}": row for number, row in enumerate(rows)}
)


def cases_of(content: dict[str, np.ndarray]) -> list[Case]:
    """Two slides of each patient, with the splits of an earlier life."""
    return [
        Case(f"{patient}-{slide}", patient, Path(f"{patient}-{slide}.svs"), split="train")
        for patient, slide in product(content, "ab")
    ]


@given(cohorts, st.integers(2, 4), st.integers(0, 99))
def test_each_patient_is_held_out_once_with_all_slides_and_neither_trains_nor_validates_there(
    content: dict[str, np.ndarray], folds: int, seed: int
) -> None:
    parts = deal_folds(content, folds, seed)
    assert len(parts) == folds and all(parts)
    assert sorted(patient for part in parts for patient in part) == sorted(content)
    assert parts == deal_folds(dict(reversed(content.items())), folds, seed)
    cases = cases_of(content)
    for held in parts:
        if len(content) - len(held) < 2:
            continue
        dealt = fold_cases(cases, held, content, 0.2, seed)
        assert [(case.slide_id, case.slide) for case in dealt] == [(case.slide_id, case.slide) for case in cases]
        patients = {split: {case.patient for case in dealt if case.split == split} for split in ("train", "val", "test")}
        assert patients["test"] == held
        assert patients["train"] and patients["val"]
        assert sum(map(len, patients.values())) == len(content)


def test_classes_are_spread_more_evenly_than_by_most_of_all_ways() -> None:
    rng = np.random.default_rng(4)
    content = {f"P{number}": rng.gamma(0.7, size=3) * (100, 10, 1) for number in range(8)}
    rows = np.stack(list(content.values()))
    shares = rows / rows.sum(axis=0)

    def spread(first: np.ndarray) -> float:
        return float(np.abs(shares[first].sum(axis=0) - 0.5).mean())

    every = [spread(np.array(way, bool)) for way in product((0, 1), repeat=8) if 0 < sum(way) < 8]
    for seed in range(5):
        first, _ = deal_folds(content, 2, seed)
        assert spread(np.array([patient in first for patient in content])) < np.median(every)


def test_patients_that_are_alike_are_dealt_out_in_equal_numbers_and_by_the_seed() -> None:
    content = {f"P{number:02d}": np.array([10.0, 1.0]) for number in range(12)}
    for folds in (2, 3, 4, 6, 12):
        assert {len(part) for part in deal_folds(content, folds, 0)} == {12 // folds}
    assert len({tuple(deal_folds(content, 3, seed)) for seed in range(5)}) > 1


def test_the_oddest_patient_is_learned_from_and_the_plainest_validates() -> None:
    content = {f"P{number}": np.array([10.0, 5.0 + number / 10]) for number in range(5)} | {"odd": np.array([1.0, 90.0])}
    held = frozenset({"P0"})
    dealt = fold_cases(cases_of(content), held, content, 0.2, 0)
    (validating,) = {case.patient for case in dealt if case.split == "val"}
    shares = {name: row / sum(content[other] for other in content if other not in held) for name, row in content.items()}
    assert validating == min(content.keys() - held, key=lambda name: np.abs(shares[name] - 1 / 5).max()) != "odd"


def test_the_share_that_validates_is_the_nearest_that_equal_parts_give() -> None:
    content = {f"P{number:02d}": np.array([10.0, 1.0]) for number in range(14)}
    dealt = fold_cases(cases_of(content), frozenset({"P00", "P01"}), content, 0.28, 0)
    assert len({case.patient for case in dealt if case.split == "val"}) == 3  # of 12: 3.36 are wanted, thirds would be 4


def test_a_share_of_nearly_all_leaves_somebody_to_learn_from() -> None:
    content = {f"P{number:02d}": np.array([10.0, 1.0]) for number in range(6)}
    dealt = fold_cases(cases_of(content), frozenset({"P00", "P01"}), content, 0.9, 0)
    assert [len({case.patient for case in dealt if case.split == split}) for split in ("train", "val")] == [2, 2]


def test_each_patient_is_learned_from_in_some_fold() -> None:
    content = {f"P{number}": row for number, row in enumerate(np.random.default_rng(3).gamma(0.7, size=(9, 2)))}
    validated, learned = list[str](), set[str]()
    for held in deal_folds(content, 9, 0):
        dealt = fold_cases(cases_of(content), held, content, 1 / 8, 0, validated)
        (validating,) = {case.patient for case in dealt if case.split == "val"}
        validated.append(validating)
        learned |= {case.patient for case in dealt if case.split == "train"}
    assert len(set(validated)) >= 8  # the last fold may have nobody left who has not validated yet
    assert learned == content.keys()


def test_without_validation_all_others_train() -> None:
    content = {"a": np.array([1.0]), "b": np.array([2.0])}
    dealt = fold_cases(cases_of(content), frozenset("a"), content, 0.0, 0)
    assert {(case.patient, case.split) for case in dealt} == {("a", "test"), ("b", "train")}
    with pytest.raises(CohortError, match="to train and to validate"):
        fold_cases(cases_of(content), frozenset("a"), content, 0.2, 0)
    with pytest.raises(CohortError, match="3 or more, one a fold"):
        deal_folds(content, 3, 0)
