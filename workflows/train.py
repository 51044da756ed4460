"""`fullfield train CONFIG`: fits the network to patches, and keeps the epoch that did best on the validation slides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import checkpoint
from pipeline.augment import Augmentation
from pipeline.cohort import Case
from pipeline.config import Config, load_config
from pipeline.errors import CheckpointError, TrainingError
from pipeline.network import ModelSpec, build_network
from pipeline.progress import console, progress
from pipeline.workspace import Workspace, fingerprint, model_spec, open_source, open_workspace, rest_index

if TYPE_CHECKING:
    from pipeline.patches import Patch, PatchStream, Source
    from pipeline.tracking import Run


@dataclass(frozen=True)
class Record:
    """One epoch as the client sees it; `best` says that its network was kept."""

    epoch: int
    metrics: Mapping[str, float]
    best: bool


def train(path: Path, overrides: Sequence[str]) -> int:
    """Run the stage by itself."""
    with open_workspace(load_config(path, overrides)) as workspace:
        train_model(workspace)
    return 0


def train_model(workspace: Workspace) -> None:
    """Train in a worker and log each epoch as it ends, unless the model is there already.

    Raises TrainingError where there is nothing to learn from, and CheckpointError where the folder holds another model.
    """
    config, model = workspace.config, workspace.model
    inputs = fingerprint(config, workspace.cases, "training")
    if not workspace.tiles.exists():
        raise TrainingError(str(workspace.tiles), "no such file", "the table of tiles", "Run `fullfield tile` first.")
    with workspace.run.child("train") as run:
        run.log_params({"training": config.training.model_dump(), "network": config.network.model_dump()})
        if model.exists():
            _check_same(model, inputs)
            console.print("train: done already")
        else:
            _watch(workspace, run, inputs)
        address = run.log_model(model, config.class_list.names, config.tracking.model, config.tracking.alias)
    console.print(f"train: model at {model}, in MLflow {address}")


def _watch(workspace: Workspace, run: Run, inputs: str) -> None:
    """Train, and tell of each epoch as it ends; the model takes its name once it is complete."""
    config, unfinished = workspace.config, workspace.output / "model.partial"
    arguments = (config, workspace.annotated(("train", "val")), workspace.tiles, unfinished, inputs)
    with progress("train: epochs", config.training.epochs) as bar:
        for record in workspace.cluster.stream(fit, *arguments):
            run.log_metrics(record.metrics, step=record.epoch)
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
    network = build_network(model_spec(config))
    spec = with_footprint(model_spec(config), network)
    sources = remembered({case.slide_id: open_source(case, config) for case in cases})
    validation = [sources[case.slide_id] for case in cases if case.split == "val"]
    stream = _stream(config, tiles, sources)
    trainer, best = Trainer(spec, network, config.training, config.seed), -1.0
    for epoch in trainer.fit(lambda number: _batches(stream, number, config)):
        dice = {}
        if validation:
            counts = validate(validation, TorchEngine(spec, trainer.averaged()))
            dice = _dice(counts, spec, rest_index(config))
        mean = sum(dice.values()) / len(dice) if dice else 0.0
        better = mean > best or not validation
        if better:
            best = mean
            lineage = {"inputs": inputs, "epoch": epoch.number, "dice": dice, "seed": config.seed}
            checkpoint.save(folder, spec, trainer.averaged(), lineage)
        metrics = {"loss": epoch.loss, "learning_rate": epoch.learning_rate, "seconds": epoch.seconds, "dice": mean}
        yield Record(epoch.number, {**metrics, **{f"dice {name}": value for name, value in dice.items()}}, better)


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
    star = ", kept" if record.best else ""
    return f"epoch {record.epoch}: loss {record.metrics['loss']:.3f}, validation Dice {record.metrics['dice']:.3f}{star}"


def _check_same(model: Path, inputs: str) -> None:
    found = checkpoint.load_lineage(model).get("inputs")
    if found != inputs:
        raise CheckpointError(
            str(model),
            "a model that was trained with another cohort or configuration",
            "none, or one of this configuration",
            "Choose another `output`, or delete that folder to train anew.",
        )
