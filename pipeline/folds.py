"""Folds for cross-validation: whole patients, and in each fold about as much of every class.

    patients   1 2 3 4 5 6 7 8 9
    fold 1     T T T v . . . . .      T  held out: `test`
    fold 2     . v . T T T . . .      v  chooses the epoch that is kept: `val`
    fold 3     . . v . . . T T T      .  is learned from: `train`

Training keeps the epoch that does best on `val`. Were the held-out patients `val`, they would choose the network that is
then examined on them, and the figures would flatter. So they are `test`, and `val` is a few of the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.cohort import Case
from pipeline.errors import CohortError

_UNITS = 1000  # into which each class, and the number of patients, are divided among the patients


def require_patients(patients: Collection[str], folds: int) -> None:
    """Raise CohortError where there are fewer patients than folds."""
    if len(patients) < folds:
        found, remedy = f"{len(patients)} with annotations", "Ask for fewer folds (--folds), or annotate more patients."
        raise CohortError("patients to cross-validate", found, f"{folds} or more, one a fold", remedy)


def deal_folds(content: Mapping[str, npt.NDArray[np.float64]], folds: int, seed: int) -> list[frozenset[str]]:
    """The held-out patients of each fold: each patient in one, patients and the extent of every class spread evenly.

    `content` has for each patient the extents of the classes, (C,), not negative, in any one unit. Patients are dealt out by
    scikit-learn's StratifiedGroupKFold: the patient least like the others first, to the fold where the shares of classes
    then differ least over folds. Its samples are extents in units of a 1000th of a class's total, and the patients
    themselves as one class more. Raises CohortError where there are fewer patients than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    patients = sorted(content)
    require_patients(patients, folds)
    extents = np.array([[*content[patient], 1] for patient in patients], np.float64)
    totals = extents.sum(axis=0)
    units = np.ceil(extents / np.where(totals > 0, totals, 1) * _UNITS).astype(np.int64)
    groups, classes = (np.repeat(index.ravel(), units.ravel()) for index in np.indices(units.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class may be rarer than folds are many
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(groups, classes, groups)
        return [frozenset(patients[index] for index in np.unique(groups[held])) for _, held in parts]


def fold_cases(
    cases: Sequence[Case],
    held: frozenset[str],
    content: Mapping[str, npt.NDArray[np.float64]],
    val_share: float,
    seed: int,
    spared: Collection[str] = (),
) -> tuple[Case, ...]:
    """The cases of a fold with their splits: test for the patients `held` out, val for `val_share` of the others, or train.

    At least one patient validates; none where the share is 0: the last epoch is kept then. The others are dealt out like
    folds, and of these parts the one validates whose classes are most like all of theirs: the parts of a small cohort are
    single patients, and the oddest one is no measure for the rest. Those of `spared`, who validated in other folds, are
    passed over where that can be, so that each patient is learned from in some fold. `content` is that of `deal_folds`.
    Raises CohortError where no patient would be left to learn from.
    """
    others = {patient: extents for patient, extents in content.items() if patient not in held}
    validating = frozenset[str]()
    if val_share > 0:
        if len(others) < 2:
            found = f"{len(others)} patient(s) beside those held out"
            remedy = "Ask for more folds (--folds), or set cohort.fractions to {train: 1, val: 0, test: 0}."
            raise CohortError("patients of a fold", found, "2 or more: to train and to validate", remedy)
        parts = min(max(round(1 / val_share), 2), len(others))
        dealt = deal_folds(others, parts, seed)
        validating = min(dealt, key=lambda part: (len(part.intersection(spared)), _oddness(part, others, parts)))
    split = {patient: "test" if patient in held else "val" if patient in validating else "train" for patient in content}
    return tuple(replace(case, split=split[case.patient]) for case in cases)


def _oddness(part: frozenset[str], content: Mapping[str, npt.NDArray[np.float64]], parts: int) -> float:
    """How far a part is from an even share, 1 / parts, of a class or of all patients: the largest difference."""
    extents = {patient: np.array([*content[patient], 1]) for patient in content}
    totals = np.sum(list(extents.values()), axis=0)
    own = np.sum([extents[patient] for patient in part], axis=0)
    return float(np.abs(own[totals > 0] / totals[totals > 0] - 1 / parts).max())
