"""A model that wants the place of another: how both did on the same patients, and whether that is enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.bootstrap import ENOUGH
from pipeline.comparison import SURE, Difference, paired_difference
from pipeline.tally import Tally, paired_means

_ROUNDING = 1e-9  # of means, so that a loss of the margin itself is none larger


@dataclass(frozen=True)
class Contest:
    """What a challenger gains over a champion: in the mean Dice over a patient's classes, and in the Dice of each class.

    `dice` and `dice_of_other` are means over patients, of the challenger and of the champion. A class that nobody's truth
    has is left out.
    """

    dice: float
    dice_of_other: float
    mean: Difference
    classes: Mapping[str, Difference]

    @classmethod
    def between(cls, champion: Tally, challenger: Tally) -> Contest | None:
        """None where nothing is known of any patient of both."""
        before, now = paired_means(champion, challenger)
        if not now:
            return None
        dice = {name: (champion.dice(name), challenger.dice(name)) for name in champion.classes}
        classes = {name: paired_difference(*both) for name, both in dice.items() if both[0].keys() & both[1].keys()}
        own, other = (float(np.mean(list(scores.values()))) for scores in (now, before))
        return cls(own, other, paired_difference(before, now), classes)

    def figures(self) -> dict[str, float | None]:
        """Means and difference of the mean Dice over classes, and the interval of that."""
        return {"dice": self.dice, "dice_of_other": self.dice_of_other, **_figures(self.mean)}

    def by_class(self) -> dict[str, dict[str, float | None]]:
        """The difference of each class, its interval, and the number of patients who have the class."""
        return {name: {**_figures(found), "patients": len(found.patients)} for name, found in self.classes.items()}

    def takes(self, margin: float) -> bool:
        """Whether the interval of the mean leaves out a loss of more than `margin`, and no class is shown to lose more."""
        return self.mean.low is not None and self.mean.low >= -margin - _ROUNDING and not self.worse(margin)

    def worse(self, margin: float) -> dict[str, Difference]:
        """The classes that are shown to lose more than `margin`: all of whose interval lies below.

        Of fewer than six patients that is less than 95 % sure: each of them loses more.
        """
        least = -margin - _ROUNDING
        return {name: found for name, found in self.classes.items() if found.high is not None and found.high < least}

    def verdict(self, champion: str, margin: float) -> str:
        """Whether the place is taken or refused, and why, in words; `champion` is what the other is called."""
        against = f"mean Dice {self.mean.mean:+.3f} against {champion}"
        if self.mean.low is None:
            return f"refused: {against}, but one patient cannot tell; examine {ENOUGH} or more"
        against, loss = f"{against} ({_interval(self.mean)})", f"a loss of more than {margin:g}"
        if self.takes(margin):
            return f"taken: {against} leaves out {loss}"
        worse = [f"{name}, {found.mean:+.3f} ({_interval(found)})" for name, found in self.worse(margin).items()]
        if worse:
            return f"refused: {against}, but more than {margin:g} is lost for {'; '.join(worse)}"
        return f"refused: {against} does not leave out {loss}"


def _figures(found: Difference) -> dict[str, float | None]:
    return {"difference": found.mean, "low": found.low, "high": found.high}


def _interval(found: Difference) -> str:
    interval = f"{found.low:+.3f} to {found.high:+.3f}, {len(found.patients)} patients"
    if found.confidence >= SURE:
        return f"95 % interval {interval}"
    return f"{found.confidence:.0%} interval {interval}, too few to be 95 % sure"
