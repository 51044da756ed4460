"""The sections of a configuration: frozen models that refuse what they do not know.

Paths are relative to the current folder. Micrometres appear in the names; everything else is in pixels of the model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pipeline.geometry import MPP_RANGE

TILE_COLUMNS = ("slide_id", "patient", "split", "x", "y", "tissue", "known")
"""Columns of the table of tiles; each class has one more."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
Precision = Literal["exact", "fast", "fastest"]
Backend = Literal["auto", "torch", "openvino"]
ALIAS, RESERVED_ALIAS = r"[A-Za-z][A-Za-z0-9_\-]*", r"latest|v\d+"
"""Patterns of what MLflow takes as an alias, and of what it keeps to itself, in letters of either case."""

SHARING = frozenset({"devices", "nodes", "strategy"})
"""Keys of `training` that say who does the work; on them its result does not depend."""


def _named(path: object) -> object:
    """The path as it is given, unless that is empty: it would be the current folder."""
    if path == "":
        raise ValueError("should name a folder or a file; `.` is the current folder")
    return path


def _at_home(path: Path) -> Path:
    """The path with the home folder that a leading ~ stands for."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"should lead somewhere: {error}") from error


Place = Annotated[Path, BeforeValidator(_named), AfterValidator(_at_home)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Fractions(Section):
    """Shares of the patients, where the manifest does not say who belongs to which split."""

    train: Fraction = 0.7
    val: Fraction = 0.15
    test: Fraction = 0.15

    @model_validator(mode="after")
    def _sum(self) -> Fractions:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError("train, val and test should sum to 1")
        return self


class CohortSettings(Section):
    """Which slides there are."""

    manifest: Place
    fractions: Fractions = Fractions()


class ClassSettings(Section):
    """One class: its colour, the annotation names it stands for, and its values in label images."""

    name: Annotated[str, Field(min_length=1)]
    color: Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")]
    annotations: tuple[str, ...] = ()
    values: tuple[Annotated[int, Field(ge=0)], ...] = ()


class AnnotationSettings(Section):
    """How outlines become truth. `rest` is the class of known pixels under no outline; null: nothing is known there."""

    known: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    rest: str | None = None
    unnamed: str | None = None
    label_mpp: Positive | None = None


class TissueSettings(Section):
    """How tissue is told from glass."""

    mpp: Annotated[float, Field(ge=1, le=64)] = 8.0
    min_area_um2: NotNegative = 20_000.0
    max_hole_um2: NotNegative = 100_000.0


class NormalisationSettings(Section):
    """How slides that are stained differently are made alike before the network sees them."""

    method: Literal["none", "macenko", "reinhard"] = "none"


class NetworkSettings(Section):
    """The network and the scale at which it looks at a slide."""

    architecture: Literal["fcn", "unet", "basic_unet", "flexible_unet", "heatmap", "classifier"] = "unet"
    mpp: Annotated[float, Field(ge=MPP_RANGE[0], le=MPP_RANGE[1])]
    width: Annotated[int, Field(ge=4, le=256)] = 16
    depth: Annotated[int, Field(ge=1, le=6)] = 4
    downsample: Literal["pool", "stride"] | None = None
    upsample: Literal["nearest", "transpose"] | None = None
    encoder: str | None = None
    residual_units: Annotated[int, Field(ge=0, le=2)] | None = None
    norm: Literal["batch", "instance"] | None = None


class TileSettings(Section):
    """The cells into which slides are divided, to count what there is and to draw patches from."""

    patch_size: Annotated[int, Field(ge=32, le=4096)] = 256
    min_tissue: Fraction = 0.05


class AugmentationSettings(Section):
    """How far a patch may be changed before it is learned from; 0 or false leaves it as it is."""

    flips: bool = True
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 45.0
    scale: Fraction = 0.25
    elastic_px: Annotated[float, Field(ge=0, lt=15)] = 5.0
    blur_px: NotNegative = 1.0
    stain: Fraction = 0.3
    tint: Fraction = 0.2
    brightness: Fraction = 0.1


class TrainingSettings(Section):
    """The optimisation. An epoch is `patches_per_epoch` patches, not a pass over the cohort.

    After every epoch validation looks at no more pixels than these patches have: where more is known of the slides that
    validate, at tiles of it that are drawn once, by the seed, evenly over slides.

    `class_weights` says how much a pixel of a class counts in the cross-entropy; one that is not named counts 1. Pixels
    within 3 px of another class count 1 + `boundary_weight` times as much.

    `optimiser` muon learns the filters with Muon, all else with AdamW; adamw learns everything with AdamW.
    Every step takes the share `learning_rate` x `weight_decay` of each weight away.

    `precision` is that of the forward pass: `fast`, bf16 where the device multiplies it, or `exact`, fp32 everywhere.

    Each batch is dealt out to `devices` processes on each of `nodes` machines, one GPU each, else processors; it needs the
    extra `distributed` where they are several. `strategy` is Lightning Fabric's: with `ddp` each has the whole network.
    """

    epochs: PositiveInt = 60
    patches_per_epoch: PositiveInt = 400
    batch_size: PositiveInt = 8
    optimiser: Literal["muon", "adamw"] = "muon"
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 1.0
    warmup_epochs: NotNegative = 1.0
    weight_average: Annotated[float, Field(ge=0, lt=1)] = 0.99
    class_weights: dict[str, Positive] = {}
    boundary_weight: NotNegative = 5.0
    max_minutes: Positive | None = None
    precision: Literal["fast", "exact"] = "fast"
    devices: PositiveInt = 1
    nodes: PositiveInt = 1
    strategy: Literal["ddp"] = "ddp"
    augmentation: AugmentationSettings = AugmentationSettings()

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.devices * self.nodes

    @model_validator(mode="after")
    def _some_after_the_warmup(self) -> TrainingSettings:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs should be no more than epochs, {self.epochs}")
        return self

    @model_validator(mode="after")
    def _even_shares(self) -> TrainingSettings:
        if self.batch_size % self.processes or self.patches_per_epoch % self.processes:
            shares = f"devices x nodes, {self.processes}: each has as large a share of a batch"
            raise ValueError(f"batch_size and patches_per_epoch should be multiples of {shares}")
        return self


class SegmentationSettings(Section):
    """Which splits are segmented by `run`, and how. `tile_size` null: chosen by what a few tiles take.

    `blend` averages overlapping windows instead of tiling exactly: for networks that are not local.
    """

    splits: Annotated[tuple[Split, ...], Field(min_length=1)] = ("val", "test")
    tile_size: Annotated[int, Field(ge=32, le=16384)] | None = None
    min_region_um2: NotNegative = 50.0
    blend: bool = False


class EngineSettings(Section):
    """How the forward pass is computed: `exact` in fp32, `fast` in bf16 or fp16, `fastest` in int8.

    `backend` auto: OpenVINO, which was measured faster on processors, where it is installed and there is no GPU; else torch.
    `max_label_change` is the largest share of tissue whose label may differ from the exact one's. `flips` takes the mean of
    the answers to a window, to its mirror image and to their quarter turns: better, in eight times the time.
    """

    precision: Precision = "exact"
    backend: Backend = "auto"
    flips: bool = False
    max_label_change: Fraction = 0.005

    @model_validator(mode="after")
    def _int8_is_openvino_s(self) -> EngineSettings:
        if (self.precision, self.backend) == ("fastest", "torch"):
            raise ValueError("backend should be auto or openvino for precision fastest: torch computes in no int8")
        return self


class EvaluationSettings(Section):
    """How figures are reported.

    `boundary_tolerance_um` is how far a boundary may lie from the truth and still be right; null: two pixels of the output.
    Of what is so large that it is looked at from a coarser level it is two pixels of that level, at the least.
    `lesions` names the classes of which the lesion FROC is computed, that of CAMELYON16.
    """

    bootstrap_samples: PositiveInt = 1000
    boundary_tolerance_um: Positive | None = None
    lesions: tuple[str, ...] = ()


class ClusterSettings(Section):
    """Where the work is done. `workers` 0: in this process; null: one, with all processors. Several share these, and GPUs.

    `worker_memory_gib` bounds the tiles whose size is chosen; null: up to 2 of what is free, or 3 where the halo costs more
    than a fifth; beside a GPU, whose memory has to do as well, all of what is free.
    """

    scheduler: str | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    worker_memory_gib: Positive | None = None

    @model_validator(mode="after")
    def _either(self) -> ClusterSettings:
        if self.scheduler is not None and self.workers is not None:
            raise ValueError("workers should be null where a scheduler is named, which has its own")
        return self


class TrackingSettings(Section):
    """Where MLflow keeps the record; null: SQLite in the output folder, unless MLFLOW_TRACKING_URI is set."""

    uri: str | None = None
    experiment: str = "fullfield"
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\- ]+$")] = "fullfield"
    alias: Annotated[str, Field(pattern=f"^{ALIAS}$")] = "newest"

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if re.fullmatch(RESERVED_ALIAS, alias, re.IGNORECASE):
            raise ValueError("should not be `latest` or a version such as `v1`, which MLflow keeps to itself")
        return alias
