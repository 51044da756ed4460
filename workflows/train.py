"""`fullfield train CONFIG`: fits the network to patches, and keeps the epoch that did best on the validation slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import checkpoint, snapshot
from pipeline.cells import read_cells
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.epoch_log import EpochLog
from pipeline.errors import TrainingError
from pipeline.fitting import fit
from pipeline.folder import require_output
from pipeline.inputs import training_facts, training_inputs
from pipeline.lineage import as_used, begin_lineage, cases_facts, models_facts, other_ways, write_lineage
from pipeline.progress import console, progress
from pipeline.snapshot import Record
from pipeline.specs import read_config
from pipeline.tile_table import read_facts
from pipeline.workspace import Workspace, log_inputs, open_workspace

_FEW_EPOCHS = 3  # with less, hardly any of them has a small learning rate

if TYPE_CHECKING:
    from pipeline.tracking import Run


def train(path: Path, overrides: Sequence[str]) -> int:
    """Run the stage by itself."""
    config = read_config(path, overrides)
    require_output(config, "tile")
    with open_workspace(config) as workspace:
        log_inputs(workspace)
        train_model(workspace)
    return 0


def train_model(workspace: Workspace) -> None:
    """Train in a worker and log each epoch as it ends, unless the model is there already.

    A training that was interrupted goes on after its last whole epoch. Raises TrainingError where there is nothing to learn
    from, or the state of the interrupted training is broken.
    """
    address = _trained(workspace, workspace.output / "model.partial")
    console.print(f"train: model at {workspace.model}, in MLflow {address}")


def _trained(workspace: Workspace, unfinished: Path) -> str:
    """The model's address in the registry, once it is there."""
    config, model = workspace.config, workspace.model
    _check_tiles(workspace)
    cases = _cases(workspace)
    done = 0 if model.exists() else _taken_up(unfinished, training_facts(config, cases))
    with begin(workspace, anew=not (model.exists() or done)) as run:
        run.log_params({"training": config.training.model_dump(), "network": config.network.model_dump()})
        if model.exists():
            console.print("train: done already")
            if kept := other_ways(model, config):
                console.print(f"train: `fullfield segment` still uses the model's own settings: {kept}")
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
    """Write what this run is made of, and at what `cost`, into its folder."""
    config = workspace.config
    facts = {
        "run": {"store": workspace.run.store.shown, "run_id": workspace.run.run_id},
        "config_digest": config.digest(),
        "seed": config.seed,
        "slides": as_used(workspace.output, cases_facts(workspace.cases, workspace.cluster)),
        "models": models_facts([workspace.model]),
    }
    return write_lineage(workspace.output, {**facts, **cost})


def require_examples(workspace: Workspace) -> None:
    """Raise TrainingError where the manifest alone tells that there is nothing to learn from, before slides are read."""
    if not workspace.model.exists() and not workspace.annotated(("train",)):
        others = len(workspace.annotated(("val", "test")))
        remedy = "Annotate slides to train on, or give some that are annotated the split `train`."
        found = f"no annotated slide with the split `train`, and {others} with another"
        raise TrainingError(str(workspace.config.cohort.manifest), found, "one or more", remedy)


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
    found = read_facts(workspace.tiles)
    if found is None or not found.is_of(workspace.config, workspace.cases):
        was = "a table of another cohort, configuration or version"
        if found is None:
            was = "a damaged table, or one of an earlier version" if workspace.tiles.exists() else "no such file"
        raise TrainingError(str(workspace.tiles), was, "the table of these tiles", "Run `fullfield tile` first.")


def _cases(workspace: Workspace) -> list[Case]:
    """The slides to learn from and to validate on: those that have cells.

    Raises TrainingError where there is none to learn from.
    """
    cases = workspace.tiled(("train", "val"))
    if not any(case.split == "train" for case in cases):
        remedy = "Annotate slides to train on, or lower tiles.min_tissue."
        raise TrainingError(str(workspace.tiles), "no cell of an annotated slide to train on", "some", remedy)
    return sorted(cases, key=lambda case: case.slide_id)  # sums over them are the same, in whatever order they are named


def _never_seen(workspace: Workspace) -> list[str]:
    """The classes of which the training slides show nothing."""
    names = list(workspace.config.class_list.names)
    rows = read_cells(workspace.tiles, names, "train")
    return [name for name in names if not np.any(rows[name].to_numpy())]


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
    config, log, records = workspace.config, EpochLog({unfinished: run}), dict[int, Record]()
    arguments = (config, cases, workspace.tiles, unfinished, training_inputs(config, workspace.cases))
    with progress("train: epochs", config.training.epochs) as bar:
        bar.skip(done)
        for record in workspace.cluster.stream(fit, *arguments):
            log.add(unfinished, record)  # an earlier one, too: the kill may have come between keeping and telling of it
            bar.grow(record.planned - bar.total)
            if record.remark and not records:
                console.print(f"train: {record.remark}")
            if record.epoch > done and record.epoch not in records:  # who takes over from a dead worker tells all again
                bar.advance(note=_note(record))
            records[record.epoch] = record
        log.finish()
    unfinished.replace(workspace.model)
    epochs = [record.metrics for record in records.values()]
    console.print(f"train: {_pace(epochs)}")
    if as_scanned := checkpoint.load_run_record(workspace.model).get("as_scanned"):
        undetermined = "used without stain normalisation, since their stain could not be determined"
        console.print(f"train: {undetermined}: {', '.join(as_scanned)}")
    if unread := sorted({name for record in records.values() for name in record.unread}):
        console.print(f"train: skipped unreadable parts of {', '.join(unread)}: copy these slides again")
    if any(case.split == "val" for case in cases) and not any("dice" in metrics for metrics in epochs):
        told = "nothing could be read" if any(record.missed for record in records.values()) else "nothing is known"
        console.print(f"train: {told} of the slides that validate, so the last epoch was kept")
    if len(epochs) < min(config.training.epochs, _FEW_EPOCHS):
        remark = "few epochs fit into training.max_minutes, too few for the learning rate to fall as it should"
        console.print(f"train: {remark}: a smaller training.patches_per_epoch gives more")


def _note(record: Record) -> str:
    dice = f", validation Dice {record.metrics['dice']:.3f}" if "dice" in record.metrics else ""
    missed = f" without {len(record.missed)} unreadable slide(s)" if dice and record.missed else ""
    return f"epoch {record.epoch}: loss {record.metrics['loss']:.3f}{dice}{missed}{', kept' if record.best else ''}"


def _pace(epochs: Sequence[Mapping[str, float]]) -> str:
    """How long it took to learn, validation apart, and how much of that was waiting for patches."""
    seconds = sum(metrics["seconds"] for metrics in epochs)
    waited = sum(metrics["seconds"] * metrics["waiting"] for metrics in epochs)
    return f"{len(epochs)} epochs of {seconds / len(epochs):.1f} s each, {waited / seconds:.1%} of them waiting for patches"
