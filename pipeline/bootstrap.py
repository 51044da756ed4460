"""The bootstrap over patients: how often each patient is drawn in each round, and the bounds over the rounds.

Counts are summed for each patient first, because pixels, objects and slides of one patient resemble each other and only
patients are independent draws. Whatever adds up over slides can then be pooled for all rounds in one product of matrices.

Rounds drawn from n patients are spread too little, by a factor of sqrt((n - 1) / n), and ignore how badly n of them tell the
spread. So the interval reaches farther out than the 2.5th and 97.5th percentiles: as far as makes it Student's where
the rounds are spread normally. How often the interval of 1000 rounds then holds what is true of all patients, in 20 000
draws of n of them: of a mean of normal scores, and of a pooled ratio as Dice is one, where areas are log-normal (sigma 1)
and the share of each that is right is beta(8, 2). In brackets: what plain percentiles hold. tests/test_metrics.py measures
some of it anew.

    patients       2          3          4          5          6          9          15         30
    mean        50 % (50)  76 % (75)  88 % (81)  92 % (84)  93 % (86)  94 % (89)  94 % (92)  95 % (94)
    ratio       49 % (49)  74 % (73)  86 % (76)  90 % (80)  91 % (83)  92 % (86)  92 % (89)  92 % (91)

Of five or fewer, the least and the largest alone miss it more often than once in twenty times, and no round is beyond them.
None of this is said of a sum of absolute values, as the calibration error is (see calibration.py), nor of a quantile, as
HD95 is.

References: Efron 1979, Annals of Statistics 7:1, doi:10.1214/aos/1176344552; resampling whole clusters: Davison and Hinkley
1997, Bootstrap Methods and their Application, section 3.8; the expanded percentiles: Hesterberg 2015, What Teachers Should
Know About the Bootstrap, The American Statistician 69:371, doi:10.1080/00031305.2015.1089789.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ENOUGH = 6
"""Patients without whom no interval can be 95 % sure."""


def draw_patients(patients: int, samples: int, seed: int) -> Counts:
    """How often each patient occurs in each of `samples` rounds, (samples, patients): each row sums to `patients`.

    No rounds where there are fewer than two patients: one patient says nothing about the next.
    """
    if patients < 2:
        return np.zeros((0, patients), np.int64)
    return np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), size=samples)


def bounds(rounds: Floats, alone: Floats) -> Floats:
    """The 95 % interval of (S, ...) rounds as (2, ...), passing over NaN: see the top of this module.

    `alone` is (P, ...): what each patient by itself has. NaN where fewer than two patients have anything: every round would
    say the same, however many others there are.
    """
    found, patients = np.full((2, *rounds.shape[1:]), np.nan), np.asarray((~np.isnan(alone)).sum(axis=0))
    for count in np.unique(patients[patients > 1]).tolist():
        found[:, patients == count] = np.nanpercentile(rounds[:, patients == count], _percentiles(count), axis=0)
    return found


def bounds_by_class(rounds: Floats, alone: Floats, draws: Counts, having: Bools) -> Floats:
    """`bounds` of C classes, (2, C), that rest on the patients whose truth has the class, `having` (P, C).

    `rounds` is (S, C), `alone` (P, C) and `draws` (S, P). Of the other patients a score would tell nothing but whether a
    single pixel was invented: rounds that draw none but them do not count. What they invent does, in all other rounds.
    """
    return bounds(np.where(draws @ having > 0, rounds, np.nan), np.where(having, alone, np.nan))


def _percentiles(patients: int) -> tuple[float, float]:
    """The percentiles of rounds over so many patients that bound their 95 % interval."""
    from scipy.special import ndtr, stdtrit

    low = 100 * float(ndtr(-math.sqrt(patients / (patients - 1)) * stdtrit(patients - 1, 0.975)))
    return low, 100 - low
