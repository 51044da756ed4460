"""`fullfield train CONFIG`: fits the network to patches, and keeps the epoch that did best on the validation slides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pyarrow import parquet

from pipeline import checkpoint, snapshot
from pipeline.architectures import build_learner, for_slides
from pipeline.augment import Augmentation
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import TrainingError
from pipeline.files import locked
from pipeline.inputs import check_model, read_stamp, tile_inputs, training_facts, training_inputs
from pipeline.lineage import ancestry, begin_lineage, case_facts, models_facts, other_ways, ways, write_lineage
from pipeline.machine import has_gpu, threads
from pipeline.network import ModelSpec
from pipeline.processes import together
from pipeline.progress import console, progress
from pipeline.snapshot import Record, Standing
from pipeline.workspace import Workspace, left_as_scanned, model_spec, open_sources, open_workspace, rest_index

_FEW_EPOCHS = 3  # with less, hardly any of them has a small learning rate

if TYPE_CHECKING:
    from pipeline.patches import Patch, PatchStream, Source
    from pipeline.team import Team
    from pipeline.tracking import Run
    from pipeline.training import Epoch, Trainer


def train(path: Path, overrides: Sequence[str]) -> int:
    """Run the stage by itself."""
    with open_workspace(load_config(path, overrides)) as workspace:
        train_model(workspace)
    return 0


def train_model(workspace: Workspace) -> None:
    """Train in a worker and log each epoch as it ends, unless the model is there already.

    A training that was interrupted goes on after its last whole epoch. Raises TrainingError where there is nothing to learn
    from, or the state of the interrupted training is broken.
    """
    model = workspace.model
    with locked(model):
        address = _trained(workspace, workspace.output / "model.partial")
    console.print(f"train: model at {model}, in MLflow {address}")


def _trained(workspace: Workspace, unfinished: Path) -> str:
    """The model's address in the registry, once it is there; nobody else trains in this output meanwhile."""
    config, model = workspace.config, workspace.model
    check_model(config, workspace.cases)  # again, since another may have trained it meanwhile
    _check_tiles(workspace)
    cases = _cases(workspace)
    done = 0 if model.exists() else _taken_up(unfinished, training_facts(config, cases))
    with begin(workspace, anew=not (model.exists() or done)) as run:
        run.log_params({"training": config.training.model_dump(), "network": config.network.model_dump()})
        if model.exists():
            console.print("train: done already")
            if kept := other_ways(model, config):
                console.print(f"train: `fullfield segment` goes on with the model's own {kept}")
        else:
            if not any(case.split == "val" for case in cases):
                console.print("train: no annotated slide validates, so the last epoch is kept")
            if absent := _never_seen(workspace):
                console.print(f"train: no training slide shows {', '.join(absent)}: the network will not learn it")
            _watch(workspace, run, cases, unfinished, done)
        workspace.run.log_file(_describe(workspace, _cost(unfinished)))
        snapshot.beside(unfinished).unlink(missing_ok=True)  # last: only it says what the training took
        return run.log_model(model, config.class_list.names, config.tracking.model, config.tracking.alias)


def _cost(unfinished: Path) -> dict[str, Any]:
    """Minutes and epochs of a training that has just ended; nothing where it ended earlier."""
    standing = snapshot.read_standing(snapshot.beside(unfinished))
    if standing is None:
        return {}
    return {"training": {"minutes": round(standing.seconds / 60, 2), "epochs": len(standing.records)}}


def _describe(workspace: Workspace, cost: Mapping[str, Any]) -> Path:
    """Write what this run is made of, and at what `cost`, into its folder; slides are read by workers."""
    for case in workspace.cases:
        workspace.cluster.submit(case, case_facts, case)
    described = {outcome.key: outcome.value for outcome in workspace.cluster if outcome.error is None}
    config = workspace.config
    facts = {
        "run": {"store": workspace.run.store.shown, "run_id": workspace.run.run_id},
        "config_digest": config.digest(),
        "seed": config.seed,
        "slides": [described[case] for case in workspace.cases if case in described],
        "models": models_facts([workspace.model]),
    }
    return write_lineage(workspace.output, {**facts, **cost})


def fit_arguments(workspace: Workspace) -> tuple[Config, Sequence[Case], Path, Path, str]:
    """What `fit` is called with for a workspace whose tiles are there; an interrupted training is taken up, and said so.

    Raises TrainingError where the tiles are those of another configuration.
    """
    _check_tiles(workspace)
    config, cases, unfinished = workspace.config, _cases(workspace), workspace.output / "model.partial"
    _taken_up(unfinished, training_facts(config, cases))
    return config, cases, workspace.tiles, unfinished, training_inputs(config, workspace.cases)


def begin(workspace: Workspace, anew: bool) -> Run:
    """The MLflow run of a training that begins `anew`, or goes on; the lineage says by whom."""
    begin_lineage(workspace.output, anew)
    return workspace.run.child("train", anew)


def _check_tiles(workspace: Workspace) -> None:
    found = read_stamp(workspace.tiles)
    if found is None or found[0] != tile_inputs(workspace.config, workspace.cases):
        was = "no such file" if found is None else "a table of another cohort or configuration"
        raise TrainingError(str(workspace.tiles), was, "the table of these tiles", "Run `fullfield tile` first.")


def _cases(workspace: Workspace) -> list[Case]:
    """The slides to learn from and to validate on: those that have tiles.

    Raises TrainingError where there is none to learn from.
    """
    tiled = set(parquet.read_table(workspace.tiles, columns=["slide_id"])["slide_id"].to_pylist())
    cases = [case for case in workspace.annotated(("train", "val")) if case.slide_id in tiled]
    if not any(case.split == "train" for case in cases):
        remedy = "Annotate slides to train on, or lower tiles.min_tissue."
        raise TrainingError(str(workspace.tiles), "no cell of an annotated slide to train on", "some", remedy)
    return sorted(cases, key=lambda case: case.slide_id)  # sums over them are the same, in whatever order they are named


def _never_seen(workspace: Workspace) -> list[str]:
    """The classes of which the training slides show nothing."""
    rows = parquet.read_table(workspace.tiles, filters=[("split", "=", "train")])
    return [name for name in workspace.config.class_list.names if not np.any(rows[name].to_numpy())]


def _taken_up(unfinished: Path, facts: Mapping[str, str]) -> int:
    """Make ready what an interrupted training left, and return how many epochs it has done; say so if there is any.

    What is left of one whose model is gone is deleted. Raises TrainingError where it was another training than this one.
    """
    state = snapshot.beside(unfinished)
    standing = snapshot.read_standing(state)
    if standing is None:
        return 0
    checkpoint.recover(unfinished)
    if not unfinished.exists():
        console.print(f"train: begins anew, since {unfinished} is gone")
        state.unlink()
        return 0
    if changed := standing.changes(facts):
        raise snapshot.of_another(state, changed)
    console.print(f"train: goes on after epoch {len(standing.records)}")
    return len(standing.records)


def _watch(workspace: Workspace, run: Run, cases: Sequence[Case], unfinished: Path, done: int) -> None:
    """Train, and tell of each epoch as it ends, `done` earlier ones first; the model takes its name once it is complete."""
    config, logged, records = workspace.config, run.steps("loss"), dict[int, Record]()
    arguments = (config, cases, workspace.tiles, unfinished, training_inputs(config, workspace.cases))
    with progress("train: epochs", config.training.epochs) as bar:
        bar.skip(done)
        for record in workspace.cluster.stream(fit, *arguments):
            if record.epoch not in logged:  # the kill may have come between keeping an epoch and telling of it
                run.log_metrics(record.metrics, step=record.epoch)
                logged.add(record.epoch)
            bar.grow(record.planned - bar.total)
            if record.epoch > done and record.epoch not in records:  # who takes over from a dead worker tells all again
                bar.advance(note=_note(record))
            records[record.epoch] = record
    unfinished.replace(workspace.model)
    epochs = [record.metrics for record in records.values()]
    console.print(f"train: {_pace(epochs)}")
    if as_scanned := checkpoint.load_run_record(workspace.model).get("as_scanned"):
        console.print(f"train: learned from as scanned, since their stain cannot be told: {', '.join(as_scanned)}")
    if "dice" not in epochs[-1] and any(case.split == "val" for case in cases):
        console.print("train: nothing is known of the slides that validate, so the last epoch was kept")
    if len(epochs) < min(config.training.epochs, _FEW_EPOCHS):
        console.print("train: few epochs fit into training.max_minutes: a smaller training.patches_per_epoch gives more")


def fit(config: Config, cases: Sequence[Case], tiles: Path, folder: Path, inputs: str) -> Iterator[Record]:
    """Train, validate after each epoch, and keep the best network in `folder`; runs wherever the cluster puts it.

    After each epoch the state is kept beside it; where there is one of this very training, its epochs are told again and it
    goes on. With several `training.devices` or `training.nodes`, processes of their own do it together.
    """
    arguments, training = (config, cases, tiles, folder, inputs), config.training
    if training.processes > 1:
        yield from together(_fit_share, arguments, training.devices, training.nodes)
    else:
        yield from _fit(None, *arguments)


def _fit_share(config: Config, *arguments: Any) -> Iterator[Record]:
    """What each of several processes does."""
    from pipeline.team import FabricTeam

    training = config.training
    team = FabricTeam(training.devices, training.nodes, training.strategy)
    yield from _fit(team, config, *arguments)
    team.close()


def _fit(
    team: Team | None, config: Config, cases: Sequence[Case], tiles: Path, folder: Path, inputs: str
) -> Iterator[Record]:
    """Train with the team, each process on its share of every batch and of the validation slides; the first writes."""
    import torch

    from pipeline.engine import TorchEngine
    from pipeline.footprint import with_footprint
    from pipeline.memory import remembered
    from pipeline.training import Trainer, memory_sufficing
    from pipeline.validation import validate

    torch.manual_seed(config.seed)
    learner = build_learner(model_spec(config))
    opened, normalisation = open_sources(cases, config)
    sources, as_scanned = remembered(opened), left_as_scanned(opened)
    spec = replace(with_footprint(model_spec(config), for_slides(learner)), normalisation=normalisation)
    validation = [sources[case.slide_id] for case in cases if case.split == "val"]
    stream = _stream(config, tiles, sources)
    trainer = Trainer(spec, learner, config.training, config.seed, team)
    rank, size = trainer.team.rank, trainer.team.size
    seen = [case_facts(case) for case in cases]
    state, standing = snapshot.beside(folder), _resume(trainer, folder, training_facts(config, cases))
    yield from standing.records
    for epoch in trainer.fit(lambda number: _batches(stream, number, config, rank, size)):
        with memory_sufficing("validation"):
            averaged = for_slides(trainer.averaged())
            counts = trainer.team.total(validate(validation[rank::size], TorchEngine(spec, averaged)))
        dice = _dice(counts, spec, rest_index(config))
        metrics = _metrics(epoch, dice)
        record = Record(epoch.number, metrics, not dice or metrics["dice"] > standing.best, trainer.planned)
        if record.best and rank == 0:
            took = {"epochs": epoch.number, "minutes": round(trainer.seconds / 60, 2)}
            origins = _run_record(config, inputs, epoch.number, dice, as_scanned), ancestry(config, seen, took)
            checkpoint.save(folder, spec, averaged, *origins)
        standing = standing.after(record, trainer.seconds)
        tensors = trainer.state()
        if rank == 0:
            snapshot.save(state, standing, tensors)
        yield record


def _resume(trainer: Trainer, folder: Path, facts: Mapping[str, str]) -> Standing:
    """Where the training stands; the trainer goes on from there. Raises TrainingError where its state is broken."""
    state = snapshot.beside(folder)
    standing = snapshot.read_standing(state)
    if standing is None or standing.changes(facts):
        return Standing(facts, (), 0.0)
    try:
        trainer.restore(snapshot.load_tensors(state), len(standing.records), standing.seconds)
    except (KeyError, RuntimeError) as error:
        raise snapshot.broken(state, error) from error
    return standing


def _metrics(epoch: Epoch, dice: Mapping[str, float]) -> dict[str, float]:
    """What is logged of an epoch."""
    metrics = {"loss": epoch.loss, "learning_rate": epoch.learning_rate, "seconds": epoch.seconds, "waiting": epoch.waiting}
    if dice:
        metrics["dice"] = sum(dice.values()) / len(dice)
    return metrics | {f"dice {name}": value for name, value in dice.items()}


def _run_record(
    config: Config, inputs: str, epoch: int, dice: Mapping[str, float], as_scanned: Sequence[str]
) -> dict[str, object]:
    """What the run hands on with its model: see `checkpoint.save`."""
    return {
        "inputs": inputs,
        "seed": config.seed,
        "epoch": epoch,
        "dice": dict(dice),
        "as_scanned": list(as_scanned),
        "tissue": config.tissue.model_dump(),
        **ways(config),
    }


def _stream(config: Config, tiles: Path, sources: Mapping[str, Source]) -> PatchStream:
    from pipeline.patches import PatchStream, read_index

    augmentation = Augmentation(**config.training.augmentation.model_dump())
    index = read_index(tiles, config.class_list.names, "train")
    # One thread keeps up with a step on processors, and would take more from it than it brings.
    readers = max(threads() // config.training.devices, 1) if has_gpu() else 1
    return PatchStream(index, sources, augmentation, config.tiles.patch_size, config.seed, readers)


def _batches(stream: PatchStream, epoch: int, config: Config, rank: int, size: int) -> Iterator[Patch]:
    """The share of every batch of process `rank` of so many."""
    training = config.training
    return stream.batches(epoch, range(rank, training.patches_per_epoch, size), training.batch_size // size)


def _dice(counts: np.ndarray, spec: ModelSpec, rest: int | None) -> dict[str, float]:
    """The pooled Dice of the classes that the truth has: what is invented costs those that it is taken from."""
    from pipeline.metrics import ratios

    values, known = ratios(counts, rest)["dice"], counts.any(axis=1)
    return {spec.classes.names[index]: float(values[index]) for index in np.flatnonzero(known)}


def _note(record: Record) -> str:
    dice = f", validation Dice {record.metrics['dice']:.3f}" if "dice" in record.metrics else ""
    return f"epoch {record.epoch}: loss {record.metrics['loss']:.3f}{dice}{', kept' if record.best else ''}"


def _pace(epochs: Sequence[Mapping[str, float]]) -> str:
    """How long it took to learn, validation apart, and how much of that was waiting for patches."""
    seconds = sum(metrics["seconds"] for metrics in epochs)
    waited = sum(metrics["seconds"] * metrics["waiting"] for metrics in epochs)
    return f"{len(epochs)} epochs of {seconds / len(epochs):.1f} s each, {waited / seconds:.1%} of them waiting for patches"
