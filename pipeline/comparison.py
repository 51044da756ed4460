"""Which of two is better: the difference over the patients that both were examined on, with its interval.

Patients differ far more from each other than two networks do on one patient. So the difference is taken patient by
patient, and the interval is Student's, of the mean of paired differences: rounds drawn from a handful of patients, as
bootstrap.py draws them for scores, would call equal models different twice as often as one time in twenty for nine
patients, and every other time for two. Reference: Student 1908, Biometrika 6:1, doi:10.1093/biomet/6.1.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Difference:
    """How much a score of the second exceeds that of the first: `mean` over `patients`, in [-1, 1].

    `low` and `high` bound its 95 % interval over patients, in [-1, 1]; None where there are fewer than two.
    """

    patients: tuple[str, ...]
    mean: float
    low: float | None
    high: float | None


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """The mean of second minus first over the patients (keys) of both, with Student's interval of 95 %.

    Raises ValueError where the two share no patient.
    """
    patients = tuple(sorted(first.keys() & second.keys()))
    if not patients:
        raise ValueError("the two share no patient")
    differences = np.array([second[patient] - first[patient] for patient in patients])
    count, mean = len(patients), float(differences.mean())
    if count < 2:
        return Difference(patients, mean, None, None)
    reach = float(stdtrit(count - 1, 0.975) * differences.std(ddof=1)) / math.sqrt(count)
    return Difference(patients, mean, max(mean - reach, -1.0), min(mean + reach, 1.0))


def in_words(difference: Difference, first: str, second: str, score: str) -> str:
    """One sentence on the difference of a score between two, called `first` and `second`: which is better, if one is.

    One is better where the 95 % interval leaves out 0.
    """
    count, mean = len(difference.patients), round(difference.mean, 3) + 0.0  # no minus before a zero
    if difference.low is None or difference.high is None:
        return (
            f"No difference can be told between {first} and {second} by {score}: "
            f"it is {mean:+.3f} for {second}, on {count} patient."
        )
    interval = f"95 % interval {difference.low:.3f} to {difference.high:.3f}, {count} patients"
    if difference.low > 0:
        return f"{second} is better than {first} by {mean:.3f} {score} ({interval})."
    if difference.high < 0:
        interval = f"95 % interval {-difference.high:.3f} to {-difference.low:.3f}, {count} patients"
        return f"{second} is worse than {first} by {-mean:.3f} {score} ({interval})."
    return f"No difference can be told between {first} and {second} by {score}: it is {mean:+.3f} for {second} ({interval})."
