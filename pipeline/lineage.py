"""Where a result comes from: code, packages, machine, slides and annotations by digest, splits, seed, and its models.

    OUTPUT/lineage.json          of a run or of many, or of slides that were segmented; runs have theirs in MLflow, too
    promotions/NAME/ALIAS/lineage.json   of a promotion, whose evidence has a digest of it
    MODEL/ancestry.json          the same of a model, of the slides that it learned from; it stays with the model

From either one can tell what a run was made of, without the folder in which it was made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.cohort import Case
from pipeline.config import ELSEWHERE, Config
from pipeline.errors import CohortError, FullfieldError, unread
from pipeline.files import file_digest, locked, put_aside, write_json
from pipeline.origin import origin, packages
from pipeline.slide import open_slide
from pipeline.tasks import Cluster

FILE = "lineage.json"


def case_facts(case: Case) -> dict[str, Any]:
    """A case with the digests of its slide and its annotation; None where the file cannot be read.

    The slide's is that of `Slide.digest`, the annotation's a SHA-256 over the file.
    """
    slide_digest = annotation_digest = None
    with suppress(FullfieldError):
        slide_digest = open_slide(case.slide, case.mpp).digest()
    if case.annotation is not None:
        with suppress(OSError):
            annotation_digest = file_digest(case.annotation)
    return {
        "slide_id": case.slide_id,
        "patient": case.patient,
        "split": case.split,
        "mpp": case.mpp,
        "slide": str(case.slide.absolute()),
        "slide_digest": slide_digest,
        "annotation": None if case.annotation is None else str(case.annotation.absolute()),
        "annotation_digest": annotation_digest,
    }


def case_of(facts: Mapping[str, Any]) -> Case:
    """The case that `case_facts` described."""
    annotation = None if facts["annotation"] is None else Path(facts["annotation"])
    return Case(facts["slide_id"], facts["patient"], Path(facts["slide"]), annotation, facts["split"], facts["mpp"])


def made_here() -> dict[str, Any]:
    """When, with which code and packages, and on which machine something is made now."""
    return {"made": datetime.now(UTC).isoformat(timespec="seconds"), **origin(), "packages": packages()}


def ancestry(config: Config, slides: Sequence[Mapping[str, Any]], training: Mapping[str, object]) -> dict[str, Any]:
    """What a model keeps of where it comes from: `slides` are facts of those it saw.

    `training` has epochs and minutes, and on which device and in which number format it was.
    """
    content = config.model_dump(mode="json", exclude={*ELSEWHERE})
    return {**made_here(), "seed": config.seed, "training": dict(training), "config": content, "slides": list(slides)}


def models_facts(models: Sequence[Path]) -> list[dict[str, Any]]:
    """Path, digest and ancestry of models. Raises CheckpointError."""
    return [
        {"path": str(model.resolve()), "digest": checkpoint.digest(model), "ancestry": checkpoint.load_ancestry(model)}
        for model in models
    ]


def cases_facts(cases: Sequence[Case], cluster: Cluster) -> list[dict[str, Any]]:
    """`case_facts` of some cases, in their order, as workers read them; none of a case whose worker died."""
    for case in cases:
        cluster.submit(case, case_facts, case)
    described = {outcome.key: outcome.value for outcome in cluster if outcome.error is None}
    return [described[case] for case in cases if case in described]


def begin_lineage(folder: Path, anew: bool) -> None:
    """Write who trains in a folder, before anything is learned there: whoever goes on with it may have other code.

    Where a training begins `anew`, the lineage of a model that is gone is put aside as `lineage.json.old`.
    """
    with _rewritten(folder) as content:
        if anew and "models" in content:
            put_aside(folder / FILE)
            content.clear()


def write_lineage(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write `facts` into FOLDER/lineage.json, beside other facts that it has already; returns its path.

    `origins` lists who began it, and each that went on with it by other code or on another machine, once.
    """
    with _rewritten(folder) as content:
        content |= facts
    return folder / FILE


def as_used(folder: Path, slides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Facts of slides, but with the digests that FOLDER/lineage.json has already: those of the files used.

    What has taken the place of a file since is told by `changes`; `note_used` notes what is used anew.
    """
    known = {slide["slide_id"]: slide for slide in _written(folder / FILE).get("slides", [])}
    return [_as_used(slide, known.get(slide["slide_id"], {})) for slide in slides]


def _as_used(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    kept = {f"{kind}_digest": before.get(f"{kind}_digest") for kind in ("slide", "annotation") if now[kind] is not None}
    return {**now, **{name: digest for name, digest in kept.items() if digest is not None}}


def note_used(folder: Path, slides: Sequence[Mapping[str, Any]]) -> Path:
    """Write facts of slides that were used just now into FOLDER/lineage.json, over earlier ones; returns its path.

    Those of a slide that can no longer be read change nothing.
    """
    readable = [slide for slide in slides if slide["slide_digest"] is not None]
    with _rewritten(folder) as content:
        known = {slide["slide_id"]: slide for slide in (*content.get("slides", []), *readable)}
        content["slides"] = list(known.values())
    return folder / FILE


def add_models(folder: Path, models: Sequence[Mapping[str, Any]]) -> None:
    """Write the facts of the models that slides were segmented with into FOLDER/lineage.json, beside earlier ones."""
    with _rewritten(folder) as content:
        digests = [model["digest"] for model in models]
        others = [model for model in content.get("segmented_with", []) if model["digest"] not in digests]
        content["segmented_with"] = [*others, *models]


def write_parts(folder: Path, config: Config, parts: Sequence[Path]) -> Path:
    """Write into FOLDER/lineage.json what each run of a larger work was made of, by the name of its folder.

    It is what the part's own lineage says, with digests alone of models and packages; little of one that has not been
    trained. Returns the path.
    """
    told = {part.name: _in_short(_written(part / FILE)) for part in parts}
    return write_lineage(folder, {"config_digest": config.digest(), "seed": config.seed, "parts": told})


def _in_short(found: Mapping[str, Any]) -> dict[str, Any]:
    origins = [{name: fact for name, fact in one.items() if name != "packages"} for one in found.get("origins", [])]
    models = [{name: model[name] for name in ("path", "digest")} for model in found.get("models", [])]
    return {**found, "origins": origins, "models": models}


def _written(path: Path) -> dict[str, Any]:
    """What a lineage holds; one that is damaged is put aside."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        put_aside(path)
        return {}
    return found


@contextmanager
def _rewritten(folder: Path) -> Iterator[dict[str, Any]]:
    """What FOLDER/lineage.json holds, for the block to change; it is written as that ends, with who goes on with it here."""
    path = folder / FILE
    with locked(path):
        content = _written(path)
        yield content
        origins, now = content.get("origins", []), made_here()
        if all({**one, "made": now["made"]} != now for one in origins):
            origins = [*origins, now]
        write_json(path, {**content, "origins": origins})


def read_lineage(path: Path) -> dict[str, Any]:
    """What `write_lineage` wrote of a run. Raises CohortError where there is no such file, or it is damaged."""
    remedy = "Name the output of `fullfield run` or `train`, or its MLflow run; of a cross-validation or sweep, a run of it."
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("origins", "slides", "models") if name not in found]
        if not missing:
            _check_facts(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CohortError(str(path), unread(error), "the lineage of a run", remedy) from error
    if missing:
        raise CohortError(str(path), f"no {', '.join(missing)}", "the lineage of a run", remedy)
    return found


def _check_facts(found: Mapping[str, Any]) -> None:
    """Raise what Python does where a lineage lacks what is asked of it, as that of another version may."""
    for slide in found["slides"]:
        case_of(slide)
    for origin_facts in found["origins"]:
        itemgetter("made", "version", "machine")(origin_facts)
    list(changes(found, found["slides"]))


def changes(then: Mapping[str, Any], slides_now: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What differs here and now from what a lineage began with, a line each: code, machine, packages, slides and truth."""
    began = then["origins"][0]
    for name in ("version", "commit", "code", "python", "machine"):
        was, found = began.get(name, "not known"), origin().get(name, "not known")
        if was != found:
            yield f"{name}: was {was}, is {found}"
    for name in sorted({*began["packages"], *packages()}):
        was, found = began["packages"].get(name, "not installed"), packages().get(name, "not installed")
        if was != found:
            yield f"package {name}: was {was}, is {found}"
    for old, new in zip(then["slides"], slides_now, strict=True):
        for kind in ("slide", "annotation"):
            was, found = old[f"{kind}_digest"], new[f"{kind}_digest"]
            if was != found:
                state = "cannot be read" if found is None else f"its digest was {was}, is {found}"
                yield f"{kind} of {old['slide_id']}, {old[kind]}: {state}"


@dataclass(frozen=True)
class Seen:
    """Whom a model saw as it was trained: its slides by digest, and its patients by name."""

    slides: frozenset[str]
    patients: frozenset[str]


def seen_by(model: Path, splits: Collection[str]) -> Seen:
    """The slides of some splits that a model saw as it was trained, and their patients; see ancestry."""
    slides = [slide for slide in checkpoint.load_ancestry(model).get("slides", []) if slide["split"] in splits]
    digests, patients = (frozenset(slide[key] for slide in slides) for key in ("slide_digest", "patient"))
    return Seen(digests, patients)


def ways(config: Config) -> dict[str, object]:
    """How a run segments slides, which a model that it trains hands on to whoever segments others with it."""
    return {"min_region_um2": config.segmentation.min_region_um2, "flips": config.engine.flips}


def other_ways(model: Path, config: Config) -> str:
    """The ways (see `ways`) in which a model's run differs from a configuration, as words; empty where there is none."""
    found = checkpoint.load_run_record(model)
    return ", ".join(f"{name} {found[name]}" for name, value in ways(config).items() if found.get(name, value) != value)
