"""`fullfield run CONFIG`: tile, train, segment and evaluate as one MLflow run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.approval import require_means
from pipeline.config import Config
from pipeline.progress import console
from pipeline.specs import read_config
from pipeline.workspace import Workspace, log_inputs, open_workspace
from workflows.evaluate import evaluate_cohort
from workflows.segment import segment_cohort
from workflows.tile import tile_cohort
from workflows.train import require_examples, train_model


def run(path: Path, overrides: Sequence[str]) -> int:
    """Run a configuration file; the exit code is 1 where a slide failed."""
    return run_config(read_config(path, overrides))


def run_config(config: Config) -> int:
    """Run every stage, each of which skips what is done; returns 1 where a slide failed, else 0.

    Raises EngineError, before anything is begun, where this machine cannot compute as `config.engine` asks.
    """
    require_means(config)
    with open_workspace(config) as workspace:
        failed = run_stages(workspace)
        command = workspace.run.open_command()
    console.print(f"\nResults are in {config.output.absolute()}. The record opens with\n  {command}")
    return failed


def run_stages(workspace: Workspace) -> int:
    """Run every stage in an open workspace; returns 1 where a slide failed, else 0."""
    log_inputs(workspace)
    require_examples(workspace)
    failures = [stage(workspace) for stage in (tile_cohort, train_model, segment_cohort, evaluate_cohort)]
    return 1 if any(failures) else 0
