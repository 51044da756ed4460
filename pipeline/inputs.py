"""What a training and a model are made from, told by digests, so that none is taken for another's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import __version__, checkpoint, snapshot
from pipeline.cohort import Case, manifest_text
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import CheckpointError, ConfigError, SlideError
from pipeline.files import as_unicode, file_digest, file_stamp
from pipeline.slide import open_slide

TILED = ("classes", "annotations", "tissue", "tiles")
"""Sections of a configuration on which the table of tiles depends, besides the network's mpp."""

_SLIDE = "slide "  # begins the names of facts that are slides
_DIGITS = 8  # of a digest that people read
_SHOWN = 60  # letters of a value that an error tells


def training_inputs(config: Config, cases: Sequence[Case]) -> str:
    """A SHA-256 over all that a trained model depends on: what is only tested on, or has no annotation, may change."""
    learned = [case for case in cases if case.split in ("train", "val") and case.annotation is not None]
    return digest_of([_training_sections(config), _stamps(learned)])


def training_facts(config: Config, cases: Sequence[Case]) -> dict[str, str]:
    """All that a training on these cases depends on, by name, so that what differs between two of them can be told."""
    facts = {"fullfield": __version__, **_named(_training_sections(config))}
    return facts | {f"{_SLIDE}{case.slide_id}": json.dumps(_case_stamp(case)) for case in cases}


def _named(sections: Mapping[str, Any]) -> dict[str, str]:
    """The values of sections of a configuration as JSON, by dotted key."""
    named = dict[str, str]()
    for name, section in sections.items():
        values = {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        named |= {key: json.dumps(value) for key, value in values.items()}
    return named


def _training_sections(config: Config) -> dict[str, Any]:
    facts = config.facts()
    return {name: facts[name] for name in facts if name in (*TILED, "normalisation", "network", "training", "seed")}


def check_output(config: Config, cases: Sequence[Case]) -> None:
    """Raise CheckpointError or TrainingError where the output has another model, or an interrupted training of another.

    A larger work asks for all its parts before it writes anything.
    """
    _check_model(config, cases)
    _check_interrupted(config)


def _check_model(config: Config, cases: Sequence[Case]) -> None:
    """Raise CheckpointError where the output has a model of another cohort or configuration, or a damaged one."""
    model = config.output / "model"
    if not model.exists():
        checkpoint.check_place(model.with_name("model.partial"))  # where one will be trained
    elif _own_record(model).get("inputs") != training_inputs(config, cases):
        settings = _differing(training_facts(_written(config), ()), training_facts(config, ()))
        there, here = settings or ("another cohort, or settings that can no longer be told", "these")
        remedy = "Choose another `output`, or delete the folders `model` and `slides` there to begin anew."
        raise CheckpointError(str(model), f"a model that was trained with {there}", f"none, or one with {here}", remedy)


def _own_record(model: Path) -> dict[str, Any]:
    """The run record of the output's own model, which nobody named: if it is damaged, it can be trained anew."""
    try:
        checkpoint.digest(model)
        return checkpoint.load_run_record(model)
    except CheckpointError as error:
        remedy = "Put its files back as they were, or delete the folders `model` and `slides` there to begin anew."
        raise CheckpointError(error.subject, error.found, error.expected, remedy) from error


def _written(config: Config) -> Config:
    """The configuration that an earlier command left in the output; the present one where none can be read."""
    with suppress(ConfigError):
        return load_config(config.output / "config.yaml")
    return config


def _differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[str, str] | None:
    """What differs between two settings, as the one and as the other has it; None where nothing does."""
    told = list[tuple[str, str]]()
    for name, here in ours.items():
        there = theirs.get(name, "not set")
        if there != here:
            told.append((f"{name} {_part(there, here)}", f"{name} {_part(here, there)}"))
    return (", ".join(one for one, _ in told), ", ".join(other for _, other in told)) if told else None


def _part(value: str, other: str) -> str:
    """That part of a value in which it begins to differ from the other."""
    start = max(len(os.path.commonprefix([value, other])) - _SHOWN // 2, 0)
    return f"{'...' if start else ''}{value[start : start + _SHOWN]}{'...' if value[start + _SHOWN :] else ''}"


def check_at_work(config: Config, cases: Sequence[Case]) -> None:
    """Raise CheckpointError where the command that works in the output has another cohort or configuration than this one.

    It has written both there; one that has not yet will be met again, by `check_output`.
    """
    written, dealt = config.output / "config.yaml", config.output / "cohort.csv"
    if not written.exists() or not dealt.exists():
        return
    theirs = _settings(load_config(written), dealt.read_bytes())
    ours = _settings(config, as_unicode(manifest_text(cases)).encode())
    if differing := _differing(theirs, ours):
        there, here = differing
        remedy = "Wait until that has ended, or choose another `output`."
        raise CheckpointError(str(config.output), f"another command at work with {there}", f"one with {here}", remedy)


def _settings(config: Config, cohort: bytes) -> dict[str, str]:
    """All on which results depend, by name; of the cohort a digest, wherever its manifest lies."""
    sections = {name: section for name, section in config.facts().items() if name != "cohort"}
    return _named(sections) | {"cohort": hashlib.sha256(cohort).hexdigest()[:_DIGITS]}


def _check_interrupted(config: Config) -> None:
    """Raise TrainingError where the output has an interrupted training of another configuration."""
    unfinished = config.output / "model.partial"
    standing = snapshot.read_standing(snapshot.beside(unfinished)) if unfinished.exists() else None
    if standing is None or (config.output / "model").exists():
        return
    sections = {name: value for name, value in standing.inputs.items() if not name.startswith(_SLIDE)}
    if changed := replace(standing, inputs=sections).changes(training_facts(config, ())):
        raise snapshot.of_another(snapshot.beside(unfinished), changed)


def content_stamp(case: Case) -> str:
    """A SHA-256 over what a case is read from, at which scale: whose it is and in which split may change."""
    return digest_of(_case_stamp(replace(case, slide_id="", patient="", split="")))


def digest_of(content: object) -> str:
    """A SHA-256 over what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stamps(cases: Sequence[Case]) -> list[list[object]]:
    """The stamps of cases by id: in which order a manifest names them tells nothing."""
    return [_case_stamp(case) for case in sorted(cases, key=lambda case: case.slide_id)]


def _case_stamp(case: Case) -> list[object]:
    """What tells a case from another: ids, scale, and digests of the slide and of the annotation."""
    annotation = "" if case.annotation is None else file_digest(case.annotation)
    slide = slide_digest(case.slide) or f"{case.slide.stat().st_size} bytes"
    return [case.slide_id, case.patient, case.split, case.mpp, slide, annotation]


def slide_digest(path: Path) -> str | None:
    """That of `Slide.digest`; None where the file cannot be opened, which is told where it is read."""
    with suppress(SlideError):  # perhaps for a moment: that is asked anew
        return _digest_of_slide(path, *file_stamp(path))
    return None


@cache
def _digest_of_slide(path: Path, *_stamp: int) -> str:
    return open_slide(path, 1.0).digest()  # at any scale, since the scan need not state one
