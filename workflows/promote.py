"""`fullfield promote MODEL`: gives a model an alias such as `champion`, if it is shown to be no worse than its holder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.assessment import count_pixels
from pipeline.canvas import open_canvas
from pipeline.checkpoint import digest, load_spec
from pipeline.cluster import connect
from pipeline.cohort import Case
from pipeline.comparison import in_words
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.contest import Contest
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
from pipeline.tally import FILE, Tally, scale_remark, shared_patients, write_tally
from pipeline.tasks import Cluster, values
from pipeline.versions import Version, decide, find_version, version_with
from pipeline.workspace import dealt_cases, slide_job
from workflows.segment import run_jobs

Facts = dict[str, Any]
"""What `case_facts` tells of a case."""

_DIGITS = 8  # of a model's digest
_REFUSED = 3
"""The exit code where the alias stays: errors have 1."""


def promote(reference: str, alias: str, margin: float, cohort: Path | None, output: Path) -> int:
    """Examine both on the same patients, keep the evidence, and move the alias; 3 where it stays, else 0.

    The alias moves where the interval of the paired difference holds no loss larger than `margin` (Dice, the mean over
    classes), and that of no class lies wholly beyond it; of fewer than six patients either is less than 95 % sure, and the
    verdict says so.
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
    contest, basis, flattered = _examined(champion, challenger, config, output, alias)
    takes, verdict = contest.takes(margin), contest.verdict(champion.reference, margin)
    if flattered:
        verdict = f"{verdict} (by patients for validation, {flattered})"
    evidence = {"against": champion.reference, "verdict": verdict, "when": _now(), "margin": margin, **basis}
    decide(store, challenger, alias, champion, takes, {**evidence, **_tags(contest)})
    for name, difference in contest.classes.items():
        console.print(in_words(difference, champion.reference, challenger.reference, f"Dice for {name}"))
    console.print(f"{challenger.reference}: {verdict}")
    if not takes:
        console.print(f"The alias {alias} stays with {champion.reference}.")
    return 0 if takes else _REFUSED


def _examined(
    champion: Version, challenger: Version, config: Config, output: Path, alias: str
) -> tuple[Contest, dict[str, str], str]:
    """How both did, what that rests on, and whom it flatters, empty where nobody. Raises CohortError."""
    with connect(config.cluster) as cluster:
        slides = _unseen(config, cluster, [champion, challenger])
        flattered = _flattered(slides, champion, challenger)
        if slides[0]["split"] == "val":
            told = f"{config.cohort.manifest} has no annotated test slides: patients for validation decide"
            console.print(f"{told}, {flattered}" if flattered else told)
        cases = [case_of(slide) for slide in slides]
        theirs, ours = (_examine(version, cases, config, cluster, output) for version in (champion, challenger))
    shared_patients(theirs, ours)  # refuses another truth
    if theirs.mpp != ours.mpp:
        console.print(f"{champion.reference}, {challenger.reference}: {scale_remark(theirs, ours)}")
    contest = Contest.between(theirs, ours)
    if contest is None:
        remedy = "Annotate test slides, or set `annotations.rest`."
        raise CohortError(str(config.cohort.manifest), "nothing known of the slides to examine", "some truth", remedy)
    models = models_facts([champion.checkpoint, challenger.checkpoint])
    about = _folder(output, challenger) / alias  # one model may compete for several, on other slides
    about.mkdir(exist_ok=True)
    facts = {"slides": slides, "contestants": models, "classes": contest.by_class()}
    lineage = file_digest(write_lineage(about, facts))
    code = {name: origin()[name] for name in ("version", "code")}
    return contest, {"split": cases[0].split, "lineage": lineage, **code}, flattered


def _flattered(slides: Sequence[Facts], champion: Version, challenger: Version) -> str:
    """Whose epoch was chosen by some of these slides, in words; empty where nobody's was."""
    digests = {slide["slide_digest"] for slide in slides} - {None}
    champions, challengers = (digests & seen_by(version.checkpoint, ("val",)).slides for version in (champion, challenger))
    if champions and challengers:
        return "which flatters both: their epochs were chosen by them"
    if champions or challengers:
        return f"which flatters the {'champion' if champions else 'challenger'}: its epoch was chosen by them"
    return ""


def _tags(contest: Contest) -> dict[str, object]:
    """The figures of a contest as tags of a version."""
    names, classes = contest.mean.patients, contest.by_class()
    return {**contest.figures(), "patients": _brief(names, names), "classes": _brief(classes, classes)}


def _brief(content: object, names: Collection[str]) -> object:
    """The content of a tag, or, of one that is too long, the first of its names."""
    return in_short(names, LINEAGE) if len(json.dumps(content)) > LONGEST_TAG else content


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

    Of the latter, slides that either learned from are left out. Raises CohortError where no case remains.
    """
    manifest = config.cohort.manifest
    annotated = [case for case in dealt_cases(config) if case.annotation is not None]
    split = "test" if any(case.split == "test" for case in annotated) else "val"
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
