"""Fitting a network to patches, wherever the cluster puts it: epochs, their validation, and what is kept of them.

    patches -- Trainer, an epoch --> averaged network -- validation --> kept, if none was better --> its Record
                                                                  `--> the state, from which a killed training goes on

It yields; who called tells of it and logs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import checkpoint, snapshot
from pipeline.augment import Augmentation
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.errors import TrainingError
from pipeline.files import locked
from pipeline.inputs import training_facts
from pipeline.lineage import ancestry, case_facts, ways
from pipeline.machine import threads
from pipeline.memory import gpu_given_back, memory_sufficing
from pipeline.metrics import ratios
from pipeline.network import ModelSpec
from pipeline.patches import Batch, PatchStream, Source, read_index
from pipeline.processes import together
from pipeline.remembered import remembered
from pipeline.snapshot import Record, Standing
from pipeline.sources import case_tissue, left_as_scanned, open_sources
from pipeline.specs import model_spec, rest_index
from pipeline.tissue import Tissue
from pipeline.validation import Validation, learned_pixels, plan_validation, validate

if TYPE_CHECKING:
    import torch

    from pipeline.team import Team
    from pipeline.training import Epoch, Trainer

_POLL_SECONDS = 1.0


def fit(config: Config, cases: Sequence[Case], tiles: Path, folder: Path, inputs: str) -> Iterator[Record]:
    """Train, validate after each epoch, and keep the best network in `folder`; runs wherever the cluster puts it.

    After each epoch the state is kept beside it; where there is one, its epochs are told again and it goes on. With several
    `training.devices` or `training.nodes`, processes of their own do it together. Raises TrainingError where the state is
    broken, or another training's, or where the model is finished meanwhile.
    """
    arguments, training = (config, cases, tiles, folder, inputs), config.training
    if training.processes > 1:
        yield from together(_fit_share, arguments, training.devices, training.nodes)
    else:
        from pipeline.team import Alone

        with gpu_given_back():
            yield from _fit(Alone(), *arguments)


def _fit_share(config: Config, *arguments: Any) -> Iterator[Record]:
    """What each of several processes does."""
    from pipeline.team import FabricTeam

    training = config.training
    team = FabricTeam(training.devices, training.nodes, training.strategy)
    yield from _fit(team, config, *arguments)
    team.close()


def _fit(team: Team, config: Config, cases: Sequence[Case], tiles: Path, folder: Path, inputs: str) -> Iterator[Record]:
    """Train as soon as nobody else does so in the folder: one that outlives its command comes to the end of its epoch."""
    with _alone(team, snapshot.beside(folder)):
        yield from _train(team, config, cases, tiles, folder, inputs)


@contextmanager
def _alone(team: Team, state: Path) -> Iterator[None]:
    """Have a training's state to oneself, as the first process of a team sees to for all of them.

    The others ask it every second, since a process that is silent for minutes is taken for dead.
    """
    while True:
        with locked(state, wait=False) if team.rank == 0 else nullcontext(True) as free:
            if team.first(free):
                yield
                return
        sleep(_POLL_SECONDS)


def _train(team: Team, config: Config, cases: Sequence[Case], tiles: Path, folder: Path, inputs: str) -> Iterator[Record]:
    """Train with the team, each process on its share of every batch and of the validation slides; the first writes."""
    from pipeline.architectures import for_slides, seeded_learner
    from pipeline.engine import TorchEngine, compute_in_fp32
    from pipeline.footprint import with_footprint
    from pipeline.training import Trainer

    compute_in_fp32()  # from the first step on, as from the first validation on
    learner = seeded_learner(model_spec(config), config.seed)
    state = snapshot.beside(folder)
    begun_with = begun.normalisation if (begun := snapshot.read_standing(state)) else None
    opened, normalisation = open_sources(cases, config, lambda found: team.first(begun_with or found))
    sources, as_scanned = remembered(opened), left_as_scanned(opened)
    spec = replace(with_footprint(model_spec(config), for_slides(learner)), normalisation=normalisation)
    validation = _validation(config, cases, sources, spec, team)
    trainer = Trainer(spec, learner, config.training, config.seed, team)
    stream = _stream(config, tiles, sources, trainer.device)
    rank, size = team.rank, team.size
    seen = [case_facts(case) for case in cases]
    standing = _resume(trainer, folder, Standing(training_facts(config, cases), (), 0.0, normalisation))
    _check_seen(validation, standing, trainer.planned)
    yield from standing.records
    for epoch in trainer.fit(lambda number: _batches(stream, number, config, rank, size)):
        with memory_sufficing("validation"):
            averaged = for_slides(trainer.averaged())
            counts, unread = validate(validation, TorchEngine(spec, averaged))
        dice = _dice(team.total(counts), spec, rest_index(config))
        metrics, missed = _metrics(epoch, dice), _of_all(team, cases, unread)
        best, passed_over = standing.is_best(metrics, missed), _of_all(team, cases, {*stream.unread, *missed})
        record = Record(epoch.number, metrics, best, trainer.planned, passed_over, validation.remark, missed)
        if record.best and rank == 0:
            took = {"epochs": epoch.number, "minutes": round(trainer.seconds / 60, 2), **trainer.way}
            origins = _run_record(config, inputs, epoch.number, dice, as_scanned), ancestry(config, seen, took)
            checkpoint.save(folder, spec, averaged, *origins, keep_earlier=True)
        standing, tensors = standing.after(record, trainer.seconds), trainer.state()
        if rank == 0:
            snapshot.save(state, standing, tensors)
            checkpoint.let_go(folder)  # now the state tells of this epoch
        yield record


def _validation(
    config: Config, cases: Sequence[Case], sources: Mapping[str, Source], spec: ModelSpec, team: Team
) -> Validation:
    """What is looked at after every epoch: of the slides that validate no more than an epoch learns from."""

    def opened(case: Case) -> tuple[Source, Tissue]:
        return sources[case.slide_id], case_tissue(case, config)

    slides = {case.slide_id: partial(opened, case) for case in cases if case.split == "val"}
    return plan_validation(slides, spec, learned_pixels(config), config.seed, team)


def _resume(trainer: Trainer, folder: Path, fresh: Standing) -> Standing:
    """Where the training stands, `fresh` at first; the trainer goes on from there, and from what was kept by then.

    Raises TrainingError where its state is broken, or that of another, as seen from here: the command has let it pass.
    """
    state = snapshot.beside(folder)
    if not state.exists():
        _check_unfinished(folder)
        return fresh
    standing, tensors = snapshot.load(state)
    if changed := standing.changes(fresh.inputs):
        raise snapshot.of_another(state, changed)
    try:
        trainer.restore(tensors, len(standing.records), standing.seconds)
    except (KeyError, RuntimeError) as error:
        raise snapshot.broken(state, error) from error
    if trainer.team.rank == 0:
        _check_kept(folder, len(standing.records))
    return standing


def _check_unfinished(folder: Path) -> None:
    """Raise TrainingError where a command has made a model of `folder`, such as while this training waited for its end."""
    model = folder.with_suffix("")
    if folder.suffix == ".partial" and model.exists():
        remedy = "Run the same command again to go on with it."
        raise TrainingError(str(model), "a model that is finished", "none yet", remedy)


def _check_seen(validation: Validation, standing: Standing, planned: int) -> None:
    """Raise TrainingError where a slide on which earlier epochs were validated cannot be read here: what is still planned
    would not be kept.
    """
    done = standing.records
    missed = [name for name in sorted(validation.unread) if any(name not in record.missed for record in done)]
    if missed and len(done) < planned:
        remedy = "Call with the same again once it can be read, to go on."
        raise TrainingError(", ".join(missed), "nothing that can be read", "what earlier epochs were validated on", remedy)


def _check_kept(folder: Path, done: int) -> None:
    """Put back what was kept before, where a kill left an epoch that is not yet `done`: made again, it may be another."""
    checkpoint.recover(folder)
    if checkpoint.load_run_record(folder)["epoch"] > done:
        checkpoint.put_back(folder)
    else:
        checkpoint.let_go(folder)


def _of_all(team: Team, cases: Sequence[Case], slides: Collection[str]) -> tuple[str, ...]:
    """The slides that any process of a team names, each its own."""
    named = team.total(np.array([case.slide_id in slides for case in cases], np.int64))
    return tuple(case.slide_id for case, times in zip(cases, named, strict=True) if times)


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


def _stream(config: Config, tiles: Path, sources: Mapping[str, Source], device: torch.device) -> PatchStream:
    augmentation = Augmentation(**config.training.augmentation.model_dump())
    index = read_index(tiles, config.class_list.names, "train")
    # One thread keeps up with a step on processors, and would take more from it than it brings.
    readers = threads() if device.type != "cpu" else 1
    centred = config.network.architecture == "classifier"
    return PatchStream(index, sources, augmentation, config.tiles.patch_size, config.seed, readers, centred)


def _batches(stream: PatchStream, epoch: int, config: Config, rank: int, size: int) -> Iterator[Batch]:
    """The share of every batch of process `rank` of so many."""
    training = config.training
    return stream.batches(epoch, range(rank, training.patches_per_epoch, size), training.batch_size // size)


def _dice(counts: np.ndarray, spec: ModelSpec, rest: int | None) -> dict[str, float]:
    """The pooled Dice of the classes that the truth has: what is invented costs those that it is taken from."""
    values, known = ratios(counts, rest)["dice"], counts.any(axis=1)
    return {spec.classes.names[index]: float(values[index]) for index in np.flatnonzero(known)}
