"""Which of two is better: the difference over the patients that both were examined on, with its interval.

Patients differ far more from each other than two networks do on one patient. So the difference is taken patient by
patient. Its interval is spanned by means over subsets of the patients: of all 2^n - 1 subsets of n differences, sorted by
their means, the true difference lies between two neighbours as often as between any two others, if the differences are
spread evenly to both sides of it, however wildly. So the interval leaves out as many means on either side as 95 % allow,
and holds the differences that a test by flipped signs would not reject. Rounds drawn as in bootstrap.py are too narrow for
few patients, and Student's interval too wide where a single one of them differs by much.

Fewer than six patients never are 95 % sure: then the interval is from the least of their differences to the largest.

Reference: Hartigan 1969, Using subsample values as typical values, J Amer Statist Assoc 64:1303.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.bootstrap import ENOUGH

SURE = 0.95
"""The confidence that it takes to tell a difference."""

_MOST_IN_FULL, _SUBSETS = 12, 4095  # patients of whom all subsets are taken; random ones of more


@dataclass(frozen=True)
class Difference:
    """How much a score of the second exceeds that of the first: `mean` over `patients`, in [-1, 1].

    `low` and `high` bound its interval over patients, which holds the true difference with a `confidence` of 95 % or a
    little more, or as much as fewer than six patients allow; None, and 0, where there is but one.
    """

    patients: tuple[str, ...]
    mean: float
    low: float | None
    high: float | None
    confidence: float


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """The mean of second minus first over the patients (keys) of both, with its interval.

    Raises ValueError where the two share no patient.
    """
    patients = tuple(sorted(first.keys() & second.keys()))
    if not patients:
        raise ValueError("the two share no patient")
    differences = np.array([second[patient] - first[patient] for patient in patients])
    mean = float(differences.mean())
    if len(patients) < 2:
        return Difference(patients, mean, None, None, 0.0)
    means = np.sort(_subset_means(differences))
    left_out = max(int((1 - SURE) / 2 * (len(means) + 1)), 1)  # parts, of those into which the means cut the line
    confidence = 1 - 2 * left_out / (len(means) + 1)
    return Difference(patients, mean, float(means[left_out - 1]), float(means[-left_out]), confidence)


def _subset_means(values: np.ndarray) -> np.ndarray:
    """The mean over each subset of values but the empty one; over some where there are very many."""
    count = len(values)
    if count <= _MOST_IN_FULL:
        chosen = np.arange(1, 1 << count)[:, None] >> np.arange(count) & 1
    else:
        chosen = np.random.default_rng(0).integers(0, 2, (_SUBSETS, count))
        chosen[~chosen.any(axis=1)] = 1
    return np.asarray(chosen @ values / chosen.sum(axis=1))


def in_words(difference: Difference, first: str, second: str, score: str) -> str:
    """One sentence on the difference of a score between two, called `first` and `second`: which is better, if one is.

    One is better where the 95 % interval leaves out 0.
    """
    count, mean = len(difference.patients), round(difference.mean, 3) + 0.0  # no minus before a zero
    low, high = difference.low, difference.high
    untold = f"No difference can be told between {first} and {second} by {score}: it is {mean:+.3f} for {second}"
    if low is None or high is None:
        return f"{untold}, on {count} patient."
    if difference.confidence < SURE:
        return f"{untold} ({low:.3f} to {high:.3f} on {count} patients; {ENOUGH} or more can tell)."
    interval = f"95 % interval {low:.3f} to {high:.3f}, {count} patients"
    amount = f"{abs(mean):.3f}" if mean else "less than 0.001"
    if low > 0:
        return f"{second} is better than {first} by {amount} {score} ({interval})."
    if high < 0:
        interval = f"95 % interval {-high:.3f} to {-low:.3f}, {count} patients"
        return f"{second} is worse than {first} by {amount} {score} ({interval})."
    return f"{untold} ({interval})."
