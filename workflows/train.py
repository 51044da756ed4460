"""`fullfield train CONFIG`: fits the network to patches, and keeps the epoch that did best on the validation slides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pyarrow import parquet

from pipeline import checkpoint
from pipeline.architectures import build_learner, for_slides
from pipeline.augment import Augmentation
from pipeline.cohort import Case
from pipeline.config import Config, load_config
from pipeline.errors import TrainingError
from pipeline.network import ModelSpec
from pipeline.progress import console, progress
from pipeline.workspace import (
    Workspace,
    model_spec,
    open_sources,
    open_workspace,
    read_stamp,
    rest_index,
    tile_inputs,
    training_inputs,
)

if TYPE_CHECKING:
    from pipeline.patches import Patch, PatchStream, Source
    from pipeline.tracking import Run


@dataclass(frozen=True)
class Record:
    """One epoch as the client sees it; `best` says that its network was kept."""

    epoch: int
    metrics: Mapping[str, float]
    best: bool
    planned: int


def train(path: Path, overrides: Sequence[str]) -> int:
    """Run the stage by itself."""
    with open_workspace(load_config(path, overrides)) as workspace:
        train_model(workspace)
    return 0


def train_model(workspace: Workspace) -> None:
    """Train in a worker and log each epoch as it ends, unless the model is there already.

    Raises TrainingError where there is nothing to learn from.
    """
    config, model = workspace.config, workspace.model
    _check_tiles(workspace)
    with workspace.run.child("train") as run:
        run.log_params({"training": config.training.model_dump(), "network": config.network.model_dump()})
        if model.exists():
            console.print("train: done already")
        else:
            _watch(workspace, run)
        address = run.log_model(model, config.class_list.names, config.tracking.model, config.tracking.alias)
    console.print(f"train: model at {model}, in MLflow {address}")


def _check_tiles(workspace: Workspace) -> None:
    found = read_stamp(workspace.tiles)
    if found is None or found[0] != tile_inputs(workspace.config, workspace.cases):
        was = "no such file" if found is None else "a table of another cohort or configuration"
        raise TrainingError(str(workspace.tiles), was, "the table of these tiles", "Run `fullfield tile` first.")


def _watch(workspace: Workspace, run: Run) -> None:
    """Train, and tell of each epoch as it ends; the model takes its name once it is complete."""
    config, unfinished = workspace.config, workspace.output / "model.partial"
    inputs = training_inputs(config, workspace.cases)
    tiled = set(parquet.read_table(workspace.tiles, columns=["slide_id"])["slide_id"].to_pylist())
    cases = [case for case in workspace.annotated(("train", "val")) if case.slide_id in tiled]
    arguments = (config, cases, workspace.tiles, unfinished, inputs)
    with progress("train: epochs", config.training.epochs) as bar:
        for record in workspace.cluster.stream(fit, *arguments):
            run.log_metrics(record.metrics, step=record.epoch)
            bar.grow(record.planned - bar.total)
            bar.advance(note=_note(record))
    unfinished.replace(workspace.model)


def fit(config: Config, cases: Sequence[Case], tiles: Path, folder: Path, inputs: str) -> Iterator[Record]:
    """Train, validate after each epoch, and keep the best network in `folder`; runs wherever the cluster puts it."""
    import torch

    from pipeline.engine import TorchEngine
    from pipeline.footprint import with_footprint
    from pipeline.memory import remembered
    from pipeline.training import Trainer
    from pipeline.validation import validate

    torch.manual_seed(config.seed)
    learner = build_learner(model_spec(config))
    opened, normalisation = open_sources(cases, config)
    sources = remembered(opened)
    spec = replace(with_footprint(model_spec(config), for_slides(learner)), normalisation=normalisation)
    validation = [sources[case.slide_id] for case in cases if case.split == "val"]
    stream = _stream(config, tiles, sources)
    trainer, best = Trainer(spec, learner, config.training, config.seed), -1.0
    for epoch in trainer.fit(lambda number: _batches(stream, number, config)):
        averaged = for_slides(trainer.averaged())
        dice = _dice(validate(validation, TorchEngine(spec, averaged)), spec, rest_index(config))
        metrics = {"loss": epoch.loss, "learning_rate": epoch.learning_rate, "seconds": epoch.seconds}
        if dice:
            metrics["dice"] = sum(dice.values()) / len(dice)
        better = not dice or metrics["dice"] > best
        if better:
            best = metrics.get("dice", best)
            checkpoint.save(folder, spec, averaged, _lineage(config, inputs, epoch.number, dice))
        metrics |= {f"dice {name}": value for name, value in dice.items()}
        yield Record(epoch.number, metrics, better, epoch.planned)


def _lineage(config: Config, inputs: str, epoch: int, dice: Mapping[str, float]) -> dict[str, object]:
    """Where a model comes from, and how its slides were looked at, so that others can be looked at alike."""
    return {
        "inputs": inputs,
        "seed": config.seed,
        "epoch": epoch,
        "dice": dict(dice),
        "tissue": config.tissue.model_dump(),
        "min_region_um2": config.segmentation.min_region_um2,
    }


def _stream(config: Config, tiles: Path, sources: Mapping[str, Source]) -> PatchStream:
    from pipeline.patches import PatchStream, read_index

    augmentation = Augmentation(**config.training.augmentation.model_dump())
    index = read_index(tiles, config.class_list.names, "train")
    return PatchStream(index, sources, augmentation, config.tiles.patch_size, config.seed)


def _batches(stream: PatchStream, epoch: int, config: Config) -> Iterator[Patch]:
    return stream.batches(epoch, range(config.training.patches_per_epoch), config.training.batch_size)


def _dice(counts: np.ndarray, spec: ModelSpec, rest: int | None) -> dict[str, float]:
    """The pooled Dice of the classes that occur."""
    from pipeline.metrics import ratios

    values = ratios(counts, rest)["dice"]
    return {name: float(value) for name, value in zip(spec.classes.names, values, strict=True) if not np.isnan(value)}


def _note(record: Record) -> str:
    dice = f", validation Dice {record.metrics['dice']:.3f}" if "dice" in record.metrics else ""
    return f"epoch {record.epoch}: loss {record.metrics['loss']:.3f}{dice}{', kept' if record.best else ''}"
