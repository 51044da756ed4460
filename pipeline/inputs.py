"""What the table of tiles, a training and a model are made from, told by digests, so that none is taken for another's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid, parquet

from pipeline import __version__, checkpoint, snapshot
from pipeline.cohort import Case, manifest_text
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import CheckpointError, ConfigError, SlideError
from pipeline.files import as_unicode, file_digest, file_stamp
from pipeline.slide import open_slide

TILED = ("classes", "annotations", "tissue", "tiles")
"""Sections of a configuration on which the table of tiles depends, besides the network's mpp."""

_INPUTS, _LEFT_OUT = b"fullfield.inputs", b"fullfield.left_out"  # keys of the metadata of the table of tiles
_SLIDE = "slide "  # begins the names of facts that are slides
_DIGITS = 8  # of a digest that people read
_SHOWN = 60  # letters of a value that an error tells


def tile_inputs(config: Config, cases: Sequence[Case]) -> str:
    """A SHA-256 over all that the table of tiles depends on, and which Fullfield counts it."""
    sections = config.model_dump(mode="json", include=set(TILED))
    return _sha256([__version__, sections, config.network.mpp, _stamps(cases)])


@dataclass(frozen=True)
class LeftOut:
    """Why a slide could not be read, and what told its `file` from others by then; empty where it is to be tried again."""

    why: str
    file: str


@dataclass(frozen=True)
class TileFacts:
    """What a table of tiles was made from, as `tile_inputs` tells it, and the slides that it leaves out, by slide_id."""

    inputs: str
    left_out: Mapping[str, LeftOut]

    def metadata(self) -> dict[bytes, str]:
        """The same as the table keeps it."""
        left_out = {name: [slide.why, slide.file] for name, slide in self.left_out.items()}
        return {_INPUTS: self.inputs, _LEFT_OUT: json.dumps(left_out, sort_keys=True)}


def told_file(path: Path) -> str:
    """What tells a file from another that takes its place, without reading it."""
    try:
        return str(file_stamp(path))
    except OSError:
        return "missing"


def read_tile_facts(tiles: Path) -> TileFacts | None:
    """What a table of tiles tells of itself; None where there is no table, or a damaged one."""
    try:
        metadata = parquet.read_schema(tiles).metadata or {}
    except (FileNotFoundError, ArrowInvalid):
        return None
    except OSError as error:
        if error.errno is None:  # what is damaged where pyarrow does not look for it
            return None
        raise
    try:
        left_out = {name: LeftOut(*told) for name, told in json.loads(metadata[_LEFT_OUT]).items()}
        return TileFacts(metadata[_INPUTS].decode(), left_out)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def tiled_already(tiles: Path, inputs: str, cases: Sequence[Case]) -> TileFacts | None:
    """What a table tells of itself, if it was made from such inputs, and those of the cases that it leaves out have not
    changed since; else None.
    """
    found = read_tile_facts(tiles)
    if found is None or found.inputs != inputs:
        return None
    absent = [case for case in cases if case.slide_id in found.left_out]
    return found if all(told_file(case.slide) == found.left_out[case.slide_id].file for case in absent) else None


def are_among(cases: Sequence[Case], others: Sequence[Case]) -> bool:
    """Whether each case is one of the others, whatever their splits: the same slide, annotation, scale and patient."""
    own, known = ({json.dumps(_case_stamp(replace(case, split="train"))) for case in group} for group in (cases, others))
    return own <= known


def training_inputs(config: Config, cases: Sequence[Case]) -> str:
    """A SHA-256 over all that a trained model depends on: what is only tested on, or has no annotation, may change."""
    learned = [case for case in cases if case.split in ("train", "val") and case.annotation is not None]
    return _sha256([_training_sections(config), _stamps(learned)])


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
    """Raise CheckpointError where the output has a model of another cohort or configuration."""
    model = config.output / "model"
    if model.exists() and checkpoint.load_run_record(model).get("inputs") != training_inputs(config, cases):
        settings = _differing(training_facts(_written(config), ()), training_facts(config, ()))
        there, here = settings or ("another cohort, or settings that can no longer be told", "these")
        remedy = "Choose another `output`, or delete the folders `model` and `slides` there to begin anew."
        raise CheckpointError(str(model), f"a model that was trained with {there}", f"none, or one with {here}", remedy)


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


def _stamps(cases: Sequence[Case]) -> list[list[object]]:
    """The stamps of cases by id: in which order a manifest names them tells nothing."""
    return [_case_stamp(case) for case in sorted(cases, key=lambda case: case.slide_id)]


def _case_stamp(case: Case) -> list[object]:
    """What tells a case from another: ids, scale, and digests of the slide and of the annotation."""
    annotation = "" if case.annotation is None else file_digest(case.annotation)
    slide = _slide_digest(case.slide, *file_stamp(case.slide))
    return [case.slide_id, case.patient, case.split, case.mpp, slide, annotation]


@cache
def _slide_digest(path: Path, size: int, *_stamp: int) -> str:
    """A slide's digest; of a file that cannot be opened, which is told where it is read, its size."""
    try:
        return open_slide(path, 1.0).digest()  # at any scale, since the scan need not state one
    except SlideError:
        return f"{size} bytes"


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
