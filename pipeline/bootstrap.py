"""The bootstrap over patients: how often each patient is drawn in each round, and the bounds over the rounds.

Counts are summed for each patient first, because pixels, objects and slides of one patient resemble each other and only
patients are independent draws. Whatever adds up over slides can then be pooled for all rounds in one product of matrices.

References: Efron 1979, Annals of Statistics 7:1, doi:10.1214/aos/1176344552; resampling whole clusters: Davison and Hinkley
1997, Bootstrap Methods and their Application, section 3.8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def draw_patients(patients: int, samples: int, seed: int) -> Counts:
    """How often each patient occurs in each of `samples` rounds, (samples, patients): each row sums to `patients`.

    No rounds where there are fewer than two patients: one patient says nothing about the next.
    """
    if patients < 2:
        return np.zeros((0, patients), np.int64)
    return np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), size=samples)


def bounds(rounds: Floats, alone: Floats) -> Floats:
    """The 2.5th and 97.5th percentiles of (S, ...) rounds as (2, ...), passing over NaN.

    `alone` is (P, ...): what each patient by itself has. NaN where fewer than two patients have anything: every round would
    say the same, however many others there are.
    """
    found = np.full((2, *rounds.shape[1:]), np.nan)
    there = (~np.isnan(alone)).sum(axis=0) > 1
    found[:, there] = np.nanpercentile(rounds[:, there], [2.5, 97.5], axis=0)
    return found
