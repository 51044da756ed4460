"""`fullfield compare RUN RUN...`: which of several runs is better, patient by patient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from pipeline.comparison import in_words, paired_difference
from pipeline.errors import CohortError
from pipeline.progress import console, new_table, show
from pipeline.tally import Tally, find_tally, scale_remark, shared_patients

_LEAST = 0.001  # mm2, the smallest area that is told as a number
_SCOPE = "All this is of these trainings: which settings are better, only several of each can tell (such as seed=0,1,2)."


def compare(references: Sequence[str]) -> int:
    """Print the Dice of every patient, and how each run differs from the first. Raises CohortError for unlike runs."""
    if len(set(references)) < max(2, len(references)):
        raise CohortError("fullfield compare", " ".join(references), "two runs or more, each once", "Name another run.")
    tallies = _fairest({reference: find_tally(reference).unseen for reference in references})
    first, *others = references
    for other in others:
        for remark in _remarks(first, tallies[first], other, tallies[other]):
            console.print(f"{first}, {other}: {remark}")
    for name in tallies[first].classes:
        dice = {reference: tally.dice(name) for reference, tally in tallies.items()}
        show(_table(name, dice))
        for other in others:
            console.print(_sentence(name, first, tallies[first], other, tallies[other]))
            if invented := _invented(name, first, tallies[first], other, tallies[other]):
                console.print(invented)
    console.print(_SCOPE)
    return 0


def _fairest(tallies: Mapping[str, Tally]) -> Mapping[str, Tally]:
    """The slides that runs held out, if each shares a patient of those with the first; else what chose an epoch, too."""
    held_out = {reference: tally.held_out for reference, tally in tallies.items()}
    first, *others = held_out.values()
    if not all(first.patients & other.patients for other in others):
        return tallies
    if any(tally.chosen_by for tally in tallies.values()):
        console.print("Compared on test slides alone: by those that validate an epoch was chosen, which flatters a run")
    return held_out


def _remarks(first: str, ours: Tally, other: str, theirs: Tally) -> Iterator[str]:
    """What a reader of the figures has to know: who is left out, whom they flatter, and that scales differ."""
    shared = shared_patients(ours, theirs, (first, other))
    if alone := sorted((ours.patients | theirs.patients) - shared):
        yield f"left out, as only one has them: {', '.join(alone)}"
    for name, chosen in ((first, ours.chosen_by - theirs.chosen_by), (other, theirs.chosen_by - ours.chosen_by)):
        if chosen & shared:
            yield f"{', '.join(sorted(chosen & shared))} chose the epoch of {name} alone, which flatters it"
    if both := ours.chosen_by & theirs.chosen_by & shared:
        yield f"{', '.join(sorted(both))} chose the epochs of both, which flatters both"
    if ours.mpp != theirs.mpp:
        yield scale_remark(ours, theirs)


def _sentence(name: str, first: str, ours: Tally, other: str, theirs: Tally) -> str:
    one, two = ours.dice(name), theirs.dice(name)
    if not one.keys() & two.keys():
        return f"No difference can be told between {first} and {other} by Dice for {name}: no patient of both has any."
    return in_words(paired_difference(one, two), first, other, f"Dice for {name}")


def _invented(name: str, first: str, ours: Tally, other: str, theirs: Tally) -> str:
    """What the runs invent of a class on patients whose truth has none of it, who have no Dice; empty where nothing."""
    one, two = ours.invented(name), theirs.invented(name)
    without = one.keys() & two.keys()
    areas = [sum(found[patient] for patient in without) for found in (one, two)]
    if not any(areas):
        return ""
    patients = f"{len(without)} patient{'s' * (len(without) > 1)} without {name}"
    return f"On {patients}: {first} invents {_area(areas[0])}, {other} {_area(areas[1])}."


def _area(mm2: float) -> str:
    return "none" if not mm2 else f"{mm2:.3f} mm2" if mm2 >= _LEAST else f"less than {_LEAST} mm2"


def _table(name: str, dice: Mapping[str, Mapping[str, float]]) -> Table:
    """A row a patient, a column a run; empty where the run has no such patient, or the patient's truth no such class."""
    table = new_table(f"Dice, {name}", "patient", *dice)
    for patient in sorted({patient for scores in dice.values() for patient in scores}):
        table.add_row(patient, *(f"{scores[patient]:.3f}" if patient in scores else "-" for scores in dice.values()))
    return table
