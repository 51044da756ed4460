"""`fullfield compare RUN RUN...`: which of several runs is better, patient by patient."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.table import Column, Table

from pipeline.comparison import in_words, paired, paired_difference
from pipeline.config import EvaluationSettings
from pipeline.errors import CohortError
from pipeline.progress import console
from pipeline.tally import Tally, find_tally, shared_patients


def compare(references: Sequence[str]) -> int:
    """Print the Dice of every patient, and how each run differs from the first. Raises CohortError for unlike runs."""
    if len(set(references)) < max(2, len(references)):
        raise CohortError("fullfield compare", " ".join(references), "two runs or more, each once", "Name another run.")
    tallies = {reference: find_tally(reference).unseen for reference in references}
    first, *others = references
    shared = dict[str, frozenset[str]]()
    for other in others:
        shared[other] = shared_patients(tallies[first], tallies[other])
        _remark(shared[other], first, tallies[first], other, tallies[other])
    for name in tallies[first].classes:
        dice = {reference: tally.dice(name) for reference, tally in tallies.items()}
        console.print(_table(name, dice))
        for other in others:
            console.print(_sentence(name, first, dice[first], other, dice[other], shared[other]))
    return 0


def _remark(shared: frozenset[str], first: str, ours: Tally, other: str, theirs: Tally) -> None:
    """Say what a reader of the figures has to know: who is left out, and that scales differ."""
    alone = sorted({row.patient for row in (*ours.rows, *theirs.rows)} - shared)
    if alone:
        console.print(f"{first}, {other}: left out, as only one has them: {', '.join(alone)}")
    if ours.mpp != theirs.mpp:
        scales = f"{ours.mpp:g} and {theirs.mpp:g} um/px"
        console.print(f"{first}, {other}: each is scored at its own scale, {scales}")


def _sentence(
    name: str, first: str, ours: Mapping[str, float], other: str, theirs: Mapping[str, float], shared: Collection[str]
) -> str:
    ours, theirs = paired(shared, ours, theirs)
    if not ours:
        return f"No difference can be told between {first} and {other} by Dice for {name}: no patient of both has any."
    samples = EvaluationSettings().bootstrap_samples
    return in_words(paired_difference(ours, theirs, samples), first, other, f"Dice for {name}")


def _table(name: str, dice: Mapping[str, Mapping[str, float]]) -> Table:
    """A row a patient, a column a run; empty where the run has no such patient, or the patient no such class."""
    columns = [Column(run, overflow="fold") for run in dice]
    table = Table("patient", *columns, title=f"Dice, {name}", title_justify="left")
    for patient in sorted({patient for scores in dice.values() for patient in scores}):
        table.add_row(patient, *(f"{scores[patient]:.3f}" if patient in scores else "-" for scores in dice.values()))
    return table
