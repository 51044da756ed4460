"""What lies at a model's path: a checkpoint, or several of them that answer as one with the mean of their probabilities.

    ENSEMBLE/ensemble.yaml    the version that wrote it; path and digest of every member

All that runs a model asks here, and so takes either. Tiles of an ensemble are exact as those of its members are: each pixel
is a mean of answers that no tile border reaches. All members see the slide with glass added, at right and bottom, up to a
multiple of every member's stride. By itself, one of a smaller stride would have less of it there, and may answer otherwise
within its footprint of these two edges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline import __version__, checkpoint
from pipeline.classes import Classes
from pipeline.errors import CheckpointError
from pipeline.files import locked, write_text
from pipeline.grid import round_up
from pipeline.network import ModelSpec
from pipeline.settings import EngineSettings, Section, SegmentationSettings, TissueSettings
from pipeline.staining import Normalisation

_FILE = "ensemble.yaml"
_REMEDY = "Put the members back where they were, or segment into another folder."
_WAYS: dict[str, type[Section]] = {"flips": EngineSettings, "min_region_um2": SegmentationSettings}
"""What a run record says of the way to segment slides, see `lineage.ways`."""

Kind = TypeVar("Kind", bound=Section)

_ALIKE = ("classes", "mpp", "output_stride", "rest")


def gather(models: Sequence[Path], folder: Path) -> Path:
    """The path of several models as one: `folder`, made if it is not there, or the model itself where it is the only one.

    Raises CheckpointError where a model is missing or does not answer as the first one does, or is given twice, and where
    `folder` is of other models.
    """
    if len(models) == 1:
        return models[0]
    found = [{"path": str(model.resolve()), "digest": checkpoint.digest(model)} for model in models]
    common_spec(models)
    digests = [member["digest"] for member in found]
    if len(set(digests)) < len(digests):
        raise CheckpointError(", ".join(map(str, models)), "a model twice", "models that differ", "Give each one once.")
    with locked(folder):
        if (folder / _FILE).exists() and [digest for _, digest in _listed(folder)] != digests:
            expected = "the models that this output was begun with"
            remedy = "Segment into another folder, or delete this output first."
            raise CheckpointError(str(folder / _FILE), "other models", expected, remedy)
        content = {"fullfield": __version__, "members": found}  # anew, since models may have been moved
        write_text(folder / _FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder


def members(model: Path) -> tuple[Path, ...]:
    """The checkpoints at a model's path: itself, or an ensemble's members.

    Raises CheckpointError where the ensemble's file is damaged, and where a member is gone or is no longer what it was.
    """
    if not (model / _FILE).is_file():
        return (model,)
    listed = _listed(model)
    for path, expected in listed:
        found = checkpoint.digest(path)
        if found != expected:
            raise CheckpointError(f"{path}, of {model / _FILE}", f"digest {found}", f"digest {expected}", _REMEDY)
    return tuple(path for path, _ in listed)


def _listed(folder: Path) -> list[tuple[Path, str]]:
    """The path and the digest of each member of an ensemble."""
    file = folder / _FILE
    try:
        listed = [(Path(item["path"]), str(item["digest"])) for item in yaml.safe_load(file.read_text("utf-8"))["members"]]
        if not listed:
            raise ValueError("no members")
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            str(file), f"a damaged file ({error})", "members, each with path and digest", _REMEDY
        ) from error
    return listed


def load_spec(model: Path) -> ModelSpec:
    """What the model is; of an ensemble, what its members have in common. Raises CheckpointError."""
    return common_spec(members(model))


def common_spec(models: Sequence[Path]) -> ModelSpec:
    """The one spec of an ensemble of these models. Raises CheckpointError where they do not go together."""
    return _together([checkpoint.load_spec(model) for model in models], models)


def load_run_record(model: Path) -> dict[str, Any]:
    """The run record of a model, of an ensemble that of its first member: see `checkpoint.save`.

    Raises CheckpointError, also where it has slides segmented in a way that this version does not know.
    """
    record = checkpoint.load_run_record(members(model)[0])
    for name, kind in _WAYS.items():
        if name in record:
            _settings(kind, {name: record[name]}, f"{model}, how its run segments slides")
    return record


def load_tissue(model: Path) -> TissueSettings:
    """How the run that trained the model looks for tissue. Raises CheckpointError."""
    return _settings(TissueSettings, load_run_record(model).get("tissue", {}), f"{model}, how its run looks for tissue")


def _settings(kind: type[Kind], told: object, subject: str) -> Kind:
    """Settings that a run has handed on."""
    try:
        return kind.model_validate(told, strict=True)
    except ValueError as error:
        expected = f"settings of {', '.join(kind.model_fields)}, as this version has them"
        remedy = "Use the version of Fullfield that wrote it."
        raise CheckpointError(subject, str(told), expected, remedy) from error


def digest(model: Path) -> str:
    """A SHA-256 over all of the model, as hexadecimal digits. Raises CheckpointError."""
    found = members(model)
    if len(found) == 1:
        return checkpoint.digest(found[0])
    return hashlib.sha256("".join(checkpoint.digest(member) for member in found).encode()).hexdigest()


def _told(value: object) -> str:
    """A fact in which models differ, for people: classes by name and colour."""
    return ", ".join(f"{item.name} {item.color}" for item in value) if isinstance(value, Classes) else str(value)


def _together(specs: Sequence[ModelSpec], models: Sequence[Path]) -> ModelSpec:
    """One spec for all: tiles start where every member's may, and read as far as the farthest looks."""
    first = specs[0]
    for spec, model in zip(specs, models, strict=True):
        for key in _ALIKE:
            if getattr(spec, key) != getattr(first, key):
                found, wanted = _told(getattr(spec, key)), _told(getattr(first, key))
                found, expected = f"{key} {found}", f"{wanted}, as {models[0]} has it"
                raise CheckpointError(str(model), found, expected, "Give models that were trained for one task.")
    stride = math.lcm(*(spec.stride for spec in specs))
    halos = [spec.halo for spec in specs if spec.halo is not None]
    if len(halos) not in (0, len(specs)):
        expected = "models that are all local, or none of which is"
        raise CheckpointError(", ".join(map(str, models)), "some of either kind", expected, "Give those of one kind.")
    if not halos and len({spec.patch_size for spec in specs}) > 1:  # they are blended, in windows of that size
        found = ", ".join(f"{spec.patch_size} px" for spec in specs)
        expected = "patches of one size, as none of them is local"
        raise CheckpointError(", ".join(map(str, models)), found, expected, "Give models that learnt from such.")
    normalisation = _joint([spec.normalisation for spec in specs], models)
    return replace(first, stride=stride, halo=round_up(max(halos), stride) if halos else None, normalisation=normalisation)


def _joint(found: Sequence[Normalisation | None], models: Sequence[Path]) -> Normalisation | None:
    """One normalisation for all where they share it, else that of each: a slide's own stain is told by one method."""
    first = found[0]
    if len(set(found)) == 1:
        return first
    methods = [None if one is None else one.method for one in found]
    if first is None or len(set(methods)) > 1:
        told = ", ".join(method or "none" for method in methods)
        expected = "one method of normalisation for all"
        raise CheckpointError(", ".join(map(str, models)), told, expected, "Give models that see slides alike.")
    return replace(first, others=tuple(one for one in found[1:] if one is not None))
