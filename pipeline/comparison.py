"""Which of two is better: the difference over the patients that both were examined on, with its interval.

Patients differ far more from each other than two networks do on one patient. So the difference is taken patient by
patient, and patients are drawn as pairs. References: see bootstrap.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.bootstrap import bounds, draw_patients
from pipeline.metrics import number


@dataclass(frozen=True)
class Difference:
    """How much a score of the second exceeds that of the first: `mean` over `patients`, in [-1, 1].

    `low` and `high` bound its 95 % interval over patients; None where there are fewer than two.
    """

    patients: tuple[str, ...]
    mean: float
    low: float | None
    high: float | None


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], samples: int = 1000, seed: int = 0
) -> Difference:
    """The mean of second minus first over the patients (keys) of both, with a percentile bootstrap interval of 95 %.

    With few patients the interval is honest about those patients only, and too narrow for others. Raises ValueError where
    the two share no patient.
    """
    patients = tuple(sorted(first.keys() & second.keys()))
    if not patients:
        raise ValueError("the two share no patient")
    differences = np.array([second[patient] - first[patient] for patient in patients])
    rounds = draw_patients(len(patients), samples, seed) @ differences / len(patients)
    low, high = bounds(rounds, differences)
    return Difference(patients, float(differences.mean()), number(low), number(high))


def paired(
    patients: Collection[str], first: Mapping[str, float], second: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The scores of a class for those of the patients of whom one run has any.

    A patient of whom neither the truth nor a run has the class has no score; where the other run invents it, and so has 0,
    saying nothing is right, and has 1.
    """
    told = [patient for patient in patients if patient in first or patient in second]
    return {patient: first.get(patient, 1.0) for patient in told}, {patient: second.get(patient, 1.0) for patient in told}


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
