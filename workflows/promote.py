"""`fullfield promote MODEL`: gives a model an alias such as `champion`, if it is shown to be no worse than its holder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.assessment import count_pixels
from pipeline.bootstrap import ENOUGH
from pipeline.canvas import open_canvas
from pipeline.checkpoint import digest, load_spec
from pipeline.cluster import connect
from pipeline.cohort import Case
from pipeline.comparison import SURE, Difference, paired_difference
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import CheckpointError, CohortError
from pipeline.files import file_digest
from pipeline.lineage import FILE as LINEAGE
from pipeline.lineage import Seen, case_facts, case_of, models_facts, seen_by, write_lineage
from pipeline.metrics import SlideConfusion
from pipeline.mlflow_names import LONGEST_TAG, in_short
from pipeline.origin import origin
from pipeline.progress import console
from pipeline.registry import check_alias
from pipeline.runtime import EXACT, with_flips
from pipeline.slide_job import CANVAS, SlideJob
from pipeline.sources import case_truth
from pipeline.specs import rest_index
from pipeline.store import Store
from pipeline.tally import FILE, Tally, paired_means, scale_remark, shared_patients, write_tally
from pipeline.tasks import Cluster, values
from pipeline.versions import Version, decide, find_version, version_with
from pipeline.workspace import dealt_cases, slide_job
from workflows.segment import run_jobs

Scores = dict[str, float]
Facts = dict[str, Any]
"""What `case_facts` tells of a case."""

_DIGITS = 8  # of a model's digest
_ROUNDING = 1e-9  # of means, so that a loss of the margin itself is none larger
_REFUSED = 3
"""The exit code where the alias stays: errors have 1."""

_FLATTERED = "which flatters the challenger: its epoch was chosen by them"


def promote(reference: str, alias: str, margin: float, cohort: Path | None, output: Path) -> int:
    """Examine both on the same patients, keep the evidence, and move the alias; 3 where it stays, else 0.

    The alias moves where the interval of the paired difference holds no loss larger than `margin` (mean Dice); of fewer
    than six patients that is less than 95 % sure, and the verdict says so.
    """
    check_alias(alias)
    store, challenger = find_version(reference)
    champion = version_with(store, challenger.name, alias)
    if champion is None:
        decide(store, challenger, alias, None, True, {"verdict": "taken: nobody had the alias", "when": _now()})
        console.print(f"{challenger.reference} takes the alias {alias}, which nobody had")
        return 0
    if champion.number == challenger.number:
        console.print(f"{challenger.reference} has the alias {alias} already")
        return 0
    _check_classes(champion, challenger)
    config = _own_config(store, challenger, output, reference) if cohort is None else load_config(cohort)
    _check_truth(config, challenger)
    theirs, ours, basis = _contest(champion, challenger, config, output, alias)
    difference = paired_difference(theirs, ours)
    takes = difference.low is not None and difference.low >= -margin - _ROUNDING
    verdict = _verdict(difference, champion, margin, takes)
    if basis["split"] == "val":
        verdict = f"{verdict} (by patients for validation, {_FLATTERED})"
    evidence = {"against": champion.reference, "verdict": verdict, "when": _now(), "margin": margin, **basis}
    decide(store, challenger, alias, champion, takes, {**evidence, **_figures(difference, theirs, ours)})
    console.print(f"{challenger.reference}: {verdict}")
    if not takes:
        console.print(f"The alias {alias} stays with {champion.reference}.")
    return 0 if takes else _REFUSED


def _contest(
    champion: Version, challenger: Version, config: Config, output: Path, alias: str
) -> tuple[Scores, Scores, dict[str, str]]:
    """The mean Dice of each patient, of the champion and of the challenger, and what it rests on. Raises CohortError."""
    with connect(config.cluster) as cluster:
        slides = _unseen(config, cluster, [champion, challenger])
        cases = [case_of(slide) for slide in slides]
        theirs, ours = (_examine(version, cases, config, cluster, output) for version in (champion, challenger))
    shared_patients(theirs, ours)  # refuses another truth
    if theirs.mpp != ours.mpp:
        console.print(f"{champion.reference}, {challenger.reference}: {scale_remark(theirs, ours)}")
    before, now = paired_means(theirs, ours)
    if not now:
        remedy = "Annotate test slides, or set `annotations.rest`."
        raise CohortError(str(config.cohort.manifest), "nothing known of the slides to examine", "some truth", remedy)
    facts = {"slides": slides, "contestants": models_facts([champion.checkpoint, challenger.checkpoint])}
    about = _folder(output, challenger) / alias  # one model may compete for several, on other slides
    about.mkdir(exist_ok=True)
    lineage = file_digest(write_lineage(about, facts))
    code = {name: origin()[name] for name in ("version", "code")}
    return before, now, {"split": cases[0].split, "lineage": lineage, **code}


def _figures(difference: Difference, theirs: Scores, ours: Scores) -> dict[str, object]:
    dice = {"dice": float(np.mean(list(ours.values()))), "dice_of_other": float(np.mean(list(theirs.values())))}
    found = {"difference": difference.mean, "low": difference.low, "high": difference.high}
    patients = difference.patients
    long = len(json.dumps(patients)) > LONGEST_TAG
    return {**dice, **found, "patients": in_short(patients, LINEAGE) if long else patients}


def _check_classes(champion: Version, challenger: Version) -> None:
    names = [", ".join(load_spec(version.checkpoint).classes.names) for version in (champion, challenger)]
    if names[0] != names[1]:
        remedy = "Choose another alias (--alias), or train with the same classes."
        raise CheckpointError(challenger.reference, f"the classes {names[1]}", f"{names[0]} of {champion.reference}", remedy)


def _check_truth(config: Config, challenger: Version) -> None:
    """Raise CheckpointError where a configuration has other classes than the model: truth is counted by their indices."""
    spec = load_spec(challenger.checkpoint)
    names, rest = [", ".join(classes.names) for classes in (config.class_list, spec.classes)], rest_index(config)
    if names[0] != names[1] or rest != spec.rest:
        found = f"the classes {names[0]}, of which annotations.rest is number {rest}"
        expected = f"{names[1]}, and number {spec.rest}, as {challenger.reference} has them"
        raise CheckpointError("fullfield promote --config", found, expected, "List the model's classes, in its order.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _own_config(store: Store, version: Version, output: Path, reference: str) -> Config:
    """The configuration of the run that made a version, with the cohort as it was dealt out then; `output` keeps both."""
    folder = _folder(output, version)
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(store.fetch(version.run_id, "config.yaml", folder, reference))
    manifest = store.fetch(version.run_id, "cohort.csv", folder, reference)
    cohort = config.cohort.model_copy(update={"manifest": manifest})
    return config.model_copy(update={"cohort": cohort})


def _folder(output: Path, version: Version) -> Path:
    """A version's own folder: another store may have a version of the same name and number."""
    return output.absolute() / f"{version.name}-{version.number}-{digest(version.checkpoint)[:_DIGITS]}"


def _unseen(config: Config, cluster: Cluster, versions: Sequence[Version]) -> list[Facts]:
    """Facts of the annotated test cases that no version saw as it was trained; where there are none, those for validation.

    The challenger's epoch was chosen on these, so a message says so; slides that either learned from are left out.
    Raises CohortError where no case remains.
    """
    manifest = config.cohort.manifest
    annotated = [case for case in dealt_cases(config) if case.annotation is not None]
    split = "test" if any(case.split == "test" for case in annotated) else "val"
    if split == "val":
        console.print(f"{manifest} has no annotated test slides: patients for validation decide, {_FLATTERED}")
    for case in annotated:
        if case.split == split:
            cluster.submit(case, case_facts, case)
    facts = values(cluster)
    counts = ("train", "val") if split == "test" else ("train",)
    seen = {version.reference: seen_by(version.checkpoint, counts) for version in versions}
    for name in (name for name, known in seen.items() if not known.slides):
        console.print(f"{name} does not tell what it was trained on: it may have been these slides")
    kept, namesakes = _strangers(sorted(facts, key=lambda slide: slide["slide_id"]), seen)
    if not kept:
        remedy = "Name a configuration with other annotated slides (--config)."
        if namesakes:
            remedy = f"Rename patients in the manifest that are other people than those of the training. {remedy}"
        raise CohortError(str(manifest), f"no {split} slide that both models have never seen", "one or more", remedy)
    return kept


def _strangers(facts: Sequence[Facts], seen: Mapping[str, Seen]) -> tuple[list[Facts], bool]:
    """The slides of patients whom no model has seen, by the models' names; and whether any is left out for a name alone.

    A name is no person: two hospitals have a patient 1 each. But a person's other slides have digests that no model knows.
    """
    digests = {slide["patient"]: set[str]() for slide in facts}
    for slide in facts:
        digests[slide["patient"]].add(slide["slide_digest"])
    kept, namesakes = [], False
    for slide in facts:
        patient, own = slide["patient"], digests[slide["patient"]]
        by = [name for name, model in seen.items() if own & model.slides or patient in model.patients]
        if not by:
            kept.append(slide)
            continue
        told = f"left out {slide['slide_id']}: {', '.join(by)} was trained on"
        if any(own & model.slides for model in seen.values()):
            console.print(f"{told} that patient")
        else:
            namesakes = True
            remedy = "if it is another person, rename it in the manifest"
            console.print(f"{told} a patient of the same name, {patient}, but on other slides: {remedy}")
    return kept, namesakes


def _examine(version: Version, cases: Sequence[Case], config: Config, cluster: Cluster, output: Path) -> Tally:
    """Segment the cases with a version, which an earlier call may have done, and count. Raises CohortError."""
    folder = _folder(output, version)
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    jobs = [_job(case, config, version, folder) for case in cases]
    console.print(f"examining {version.reference} on {len(cases)} slide(s)")
    rows = run_jobs(jobs, cluster, folder, config.cluster.worker_memory_gib)
    failed = [f"{row.slide_id}: {row.reason}" for row in rows if row.status == "failed"]
    if failed:
        raise CohortError(version.reference, "; ".join(failed), "an answer on every slide", "Correct it, then call again.")
    for case, job in zip(cases, jobs, strict=True):
        cluster.submit(case, count, case, config, job)
    counted = tuple(sorted(values(cluster), key=lambda row: row.slide_id))
    canvas = open_canvas(jobs[0].folder / CANVAS)
    tally = Tally(canvas.classes.names, rest_index(config), canvas.lattice.mpp.x, counted)
    write_tally(folder / FILE, tally)
    return tally


def _job(case: Case, config: Config, version: Version, folder: Path) -> SlideJob:
    """A case to segment at exact, in as many views as the version's own run did: whoever is better is so by its weights.

    Only what is not local is blended.
    """
    model = version.checkpoint.absolute()
    settings = config.segmentation.model_copy(update={"tile_size": None, "blend": load_spec(model).halo is None})
    job = replace(slide_job(case, config), model=model, settings=settings, engine=with_flips(EXACT, model, None))
    return replace(job, folder=folder / "slides" / case.slide_id)


def count(case: Case, config: Config, job: SlideJob) -> SlideConfusion:
    """The pixels of a segmented case, by true and predicted class. Raises AnnotationError or CanvasError."""
    counts = count_pixels(open_canvas(job.folder / CANVAS), case_truth(case, config))
    return SlideConfusion(case.slide_id, case.patient, case.split, counts)


def _verdict(difference: Difference, champion: Version, margin: float, takes: bool) -> str:
    against = f"mean Dice {difference.mean:+.3f} against {champion.reference}"
    if difference.low is None or difference.high is None:
        return f"refused: {against}, but one patient cannot tell; examine {ENOUGH} or more"
    interval = f"{difference.low:+.3f} to {difference.high:+.3f}, {len(difference.patients)} patients"
    if difference.confidence >= SURE:
        interval = f"95 % interval {interval}"
    else:
        interval = f"{difference.confidence:.0%} interval {interval}, too few to be 95 % sure"
    if takes:
        return f"taken: {against} ({interval}) leaves out a loss of more than {margin:g}"
    return f"refused: {against} ({interval}) does not leave out a loss of more than {margin:g}"
