"""What a run depends on: all sections of its configuration, and whether they go together.

Paths are relative to the current folder.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.classes import Class, Classes
from pipeline.settings import (
    SHARING,
    TILE_COLUMNS,
    AnnotationSettings,
    ClassSettings,
    ClusterSettings,
    CohortSettings,
    EngineSettings,
    EvaluationSettings,
    NetworkSettings,
    NormalisationSettings,
    Place,
    Section,
    SegmentationSettings,
    TileSettings,
    TissueSettings,
    TrackingSettings,
    TrainingSettings,
)
from pipeline.yaml_text import dump

ELSEWHERE = ("output", "cluster", "tracking")
"""Sections that say where files lie and who does the work; on them no result depends."""


class Config(Section):
    """Everything that a run depends on."""

    output: Place
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    cohort: CohortSettings
    classes: Annotated[tuple[ClassSettings, ...], Field(min_length=2, max_length=254)]
    annotations: AnnotationSettings = AnnotationSettings()
    tissue: TissueSettings = TissueSettings()
    normalisation: NormalisationSettings = NormalisationSettings()
    network: NetworkSettings
    tiles: TileSettings = TileSettings()
    training: TrainingSettings = TrainingSettings()
    segmentation: SegmentationSettings = SegmentationSettings()
    engine: EngineSettings = EngineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _known_names(self) -> Config:
        names = [item.name for item in self.classes]
        if taken := sorted(set(names) & set(TILE_COLUMNS)):
            raise ValueError(f"classes should not be called {taken}, which are columns of the table of tiles")
        if len(set(names)) != len(names):
            raise ValueError(f"class names should differ, found {names}")
        claimed = [f"annotation {name!r}" for item in self.classes for name in item.annotations or (item.name,)]
        claimed += [f"label value {value}" for item in self.classes for value in item.values]
        if twice := sorted({item for item in claimed if claimed.count(item) > 1}):
            raise ValueError(f"each should belong to one class only: {', '.join(twice)}")
        outlined = {name for item in self.classes for name in item.annotations or (item.name,)}
        for key, patterns in (("known", self.annotations.known), ("ignored", self.annotations.ignored)):
            if both := sorted(outlined.intersection(patterns)):
                raise ValueError(f"annotations.{key} should name no outline that stands for a class, found {both}")
        used: dict[str, set[str | None]] = {
            "annotations.rest": {self.annotations.rest} - {None},
            "annotations.unnamed": {self.annotations.unnamed} - {None},
            "training.class_weights": set(self.training.class_weights),
            "evaluation.lesions": set(self.evaluation.lesions),
        }
        for key, found in used.items():
            if unknown := sorted(str(name) for name in found.difference(names)):
                raise ValueError(f"{key} should name classes of {names}, found {unknown}")
        if self.annotations.rest in self.evaluation.lesions:
            raise ValueError(f"evaluation.lesions should not name {self.annotations.rest}, which is annotations.rest")
        if self.network.norm == "instance" and not self.segmentation.blend:
            raise ValueError(
                "segmentation.blend should be true for network.norm instance: it looks at the whole image at once, so that "
                "no tiling is exact (or leave network.norm out)"
            )
        return self

    @model_validator(mode="after")
    def _enough_for_batch_norm(self) -> Config:
        last = self.training.patches_per_epoch % self.training.batch_size or self.training.batch_size
        if last == self.training.processes and self.tiles.patch_size <= 2**self.network.depth:
            raise ValueError(
                f"tiles.patch_size should be over {2**self.network.depth} at network.depth {self.network.depth} where a "
                "process has but one patch of a batch: batch norm needs more than one pixel (or change training.batch_size)"
            )
        return self

    @property
    def class_list(self) -> Classes:
        """The classes in the order of their indices."""
        return Classes(tuple(Class.of_hex(item.name, item.color) for item in self.classes))

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that `load_config` reads back."""
        return dump(self.model_dump(mode="json"))

    def digest(self) -> str:
        """A SHA-256 over everything but where files lie and who does the work, as hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """All on which results depend, as plain values; what the manifest lists is told by digests of its own."""
        parts = {"cohort": {"manifest"}, "training": {*SHARING}}
        return self.model_dump(mode="json", exclude={**dict.fromkeys(ELSEWHERE, True), **parts})
