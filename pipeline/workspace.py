"""The output folder of a run with everything that its stages share: config, cohort, cluster and MLflow run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.annotations import ClassMap, Truth, open_truth
from pipeline.cluster import Cluster, connect
from pipeline.cohort import Case, deal_out, read_manifest, write_manifest
from pipeline.config import Config
from pipeline.files import write_text
from pipeline.geometry import Mpp
from pipeline.network import ModelSpec
from pipeline.patches import Source
from pipeline.progress import console
from pipeline.slide import open_slide
from pipeline.tracking import Run

_STAGES = ("cohort", "classes", "annotations", "tissue", "network", "tiles", "training", "seed")
"""The sections of a configuration on which a model depends, in the order in which stages use them."""


@dataclass(frozen=True)
class Workspace:
    """What a stage works with. `cases` have their splits; results are below `output`."""

    config: Config
    cases: tuple[Case, ...]
    cluster: Cluster
    run: Run

    @property
    def output(self) -> Path:
        """The folder of results."""
        return self.config.output

    @property
    def tiles(self) -> Path:
        """The table of cells that the tile stage writes."""
        return self.output / "tiles.parquet"

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.output / "model"

    def annotated(self, splits: Sequence[str]) -> list[Case]:
        """The cases of some splits of which something is known."""
        return [case for case in self.cases if case.split in splits and case.annotation is not None]


@contextmanager
def open_workspace(config: Config) -> Iterator[Workspace]:
    """Read the cohort, deal out the splits and write them, then connect to MLflow and to the cluster.

    Raises CohortError, ConfigError, NetworkError or TrackingError before anything expensive begins.
    """
    model_spec(config)
    cases = deal_out(read_manifest(config.cohort.manifest), config.cohort.fractions.model_dump(), config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    write_manifest(config.output / "cohort.csv", cases)
    write_text(config.output / "config.yaml", config.to_yaml())
    settings = config.tracking
    with (
        Run.start(config.output, settings.experiment, config.output.name, settings.uri) as run,
        connect(config.cluster) as cluster,
    ):
        console.print(f"Work is done by {cluster.description}")
        yield Workspace(config, cases, cluster, run)


def model_spec(config: Config) -> ModelSpec:
    """The model that a configuration describes, before its footprint is measured. Raises NetworkError."""
    network = config.network
    return ModelSpec(
        architecture=network.architecture,
        classes=config.class_list,
        mpp=network.mpp,
        patch_size=config.tiles.patch_size,
        width=network.width,
        depth=network.depth,
        downsample=network.downsample,
        upsample=network.upsample,
        encoder=network.encoder,
        rest=rest_index(config),
    )


def open_source(case: Case, config: Config) -> Source:
    """The slide and the truth of an annotated case, on the lattice of the model."""
    slide = open_slide(case.slide, case.mpp)
    return Source(slide, case_truth(case, config), slide.base.at(Mpp.square(config.network.mpp)))


def case_truth(case: Case, config: Config) -> Truth:
    """What is known of a case. Raises AnnotationError."""
    if case.annotation is None:
        raise ValueError(f"case {case.slide_id} has no annotation")
    return open_truth(
        case.annotation, open_slide(case.slide, case.mpp).base, class_map(config), config.annotations.label_mpp
    )


def class_map(config: Config) -> ClassMap:
    """How names in annotation files, and values in label images, become classes."""
    settings, classes = config.annotations, config.class_list
    return ClassMap(
        classes=classes,
        names={name: index for index, item in enumerate(config.classes) for name in item.annotations or (item.name,)},
        values={value: index for index, item in enumerate(config.classes) for value in item.values},
        known=settings.known,
        ignored=settings.ignored,
        rest=None if settings.rest is None else classes.index(settings.rest),
        unnamed=None if settings.unnamed is None else classes.index(settings.unnamed),
    )


def rest_index(config: Config) -> int | None:
    """The index of the class of known pixels under no outline, or None."""
    rest = config.annotations.rest
    return None if rest is None else config.class_list.index(rest)


def fingerprint(config: Config, cases: Sequence[Case], last: str) -> str:
    """A SHA-256 over the cases and the sections of the configuration up to `last`: what a stage's result depends on."""
    sections = _STAGES[: _STAGES.index(last) + 1]
    content = {name: config.model_dump(mode="json")[name] for name in (*sections, "seed")}
    content["cohort"] = [[case.slide_id, case.patient, case.split, _file_stamp(case)] for case in cases]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_stamp(case: Case) -> list[object]:
    """What tells a slide and its annotation from others: sizes, and a digest of the annotation."""
    annotation = hashlib.sha256(case.annotation.read_bytes()).hexdigest() if case.annotation else ""
    return [case.slide.stat().st_size, annotation, case.mpp]
