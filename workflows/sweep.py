"""`fullfield sweep CONFIG key=value,value...`: every combination trained, side by side, and scored on validation slides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pipeline.approval import require_means
from pipeline.combinations import Combination, combine
from pipeline.config import Config
from pipeline.epoch_log import EpochLog
from pipeline.errors import CohortError, FullfieldError
from pipeline.fitting import fit
from pipeline.inputs import check_output
from pipeline.lineage import write_parts
from pipeline.metrics import POOLED
from pipeline.progress import console, new_table, progress, show
from pipeline.scoreboard import UNSCORED, Entry, ranked, write_scoreboard
from pipeline.specs import read_config
from pipeline.tally import FILE as TALLY
from pipeline.tally import read_tally, scale_remark
from pipeline.tasks import Cluster
from pipeline.workspace import Workspace, adopt_tiles, dealt_cases, open_within, open_workspace
from workflows.run import run_stages
from workflows.tile import tile_cohort
from workflows.train import begin, fit_arguments

_FILES = ("sweep.csv", "sweep.md", "sweep.png")
_SPLIT = "val"


def sweep(path: Path, overrides: Sequence[str]) -> int:
    """Sweep over a configuration file; the exit code is 1 where a combination, or a slide of one, failed."""
    fixed, combinations = combine(overrides)
    config = read_config(path, [*fixed, *_first(combinations)])
    configs = [read_config(path, [*fixed, *combination.overrides]) for combination in combinations]
    parts = [_part(config, *pair) for pair in zip(combinations, configs, strict=True)]
    cases = dealt_cases(config)
    for part in parts:
        check_output(part, cases)
        require_means(part)
    with open_workspace(config, own="sweep.csv") as workspace:
        if not workspace.annotated((_SPLIT,)):
            remedy = "Name some patients as val in the manifest, or set cohort.fractions.val."
            raise CohortError(str(config.cohort.manifest), "no annotated val slide", "slides to choose by", remedy)
        workspace.run.log_config(workspace.config.to_yaml(), workspace.config.digest())
        if not (workspace.output / _FILES[0]).exists():  # whose output this is, should the sweep be interrupted
            write_scoreboard(workspace.output, [Entry(item.name, item.values, {}, UNSCORED) for item in combinations])
        failures = [tile_cohort(workspace)]
        failed = train_parts(workspace, parts, "sweep")
        entries = []
        for combination, part in zip(combinations, parts, strict=True):
            console.print(f"\n{combination.name}")
            entry, failure = _finish(workspace, combination, part, failed.get(part.output))
            entries.append(entry)
            failures.append(failure)
        workspace.run.log_file(write_parts(workspace.output, workspace.config, [part.output for part in parts]))
        _publish(workspace, ranked(entries))
        command = workspace.run.open_command()
    console.print(f"\nResults are in {config.output.absolute()}. The record opens with\n  {command}")
    return 1 if any(failures) else 0


def _first(combinations: Sequence[Combination]) -> list[str]:
    """What the first combination sets, since the file may lack it; but no seed, as the file's deals out the patients."""
    return [override for override in combinations[0].overrides if not override.startswith("seed=")]


def _part(whole: Config, combination: Combination, config: Config) -> Config:
    """A combination's own configuration: the cohort as it was dealt out for all, and no look at test slides."""
    folder = whole.output.absolute()
    cohort = config.cohort.model_copy(update={"manifest": folder / "cohort.csv"})
    segmentation = config.segmentation.model_copy(update={"splits": (_SPLIT,)})
    output = folder / combination.name
    return config.model_copy(update={"output": output, "cohort": cohort, "segmentation": segmentation})


def train_parts(whole: Workspace, parts: Sequence[Config], command: str) -> dict[Path, FullfieldError]:
    """Train all that have no model, as many at once as there are workers; returns why some failed, by output folder.

    What is trained waits as an interrupted training that has no epoch left to do; its epochs are told at once.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_within(whole, part)) for part in parts]
        for part in opened:
            adopt_tiles(part, whole)
            tile_cohort(part)
        waiting, failed = list[tuple[Workspace, tuple[Any, ...]]](), dict[Path, FullfieldError]()
        for part in opened:
            try:
                if not part.model.exists():
                    waiting.append((part, fit_arguments(part)))
            except FullfieldError as error:
                failed[part.output] = error
        return failed | _watch(waiting, whole.cluster, command)


def _watch(
    waiting: Sequence[tuple[Workspace, tuple[Any, ...]]], cluster: Cluster, command: str
) -> dict[Path, FullfieldError]:
    """Train parts, each with what `fit` is called with, and log their epochs; returns why some failed."""
    tasks = {part.output: (fit, arguments) for part, arguments in waiting}
    failed, planned = dict[Path, FullfieldError](), {part.output: part.config.training.epochs for part, _ in waiting}
    with ExitStack() as stack, progress(f"{command}: epochs of all", sum(planned.values())) as bar:
        ends = {part.output: stack.enter_context(ExitStack()) for part, _ in waiting}
        runs = {part.output: ends[part.output].enter_context(begin(part, not part.is_interrupted())) for part, _ in waiting}
        log = EpochLog(runs)
        for outcome in cluster.streams(tasks):
            output, record = outcome.key, outcome.value
            if isinstance(outcome.error, FullfieldError):
                failed[output] = outcome.error
                with suppress(FullfieldError), ends[output].pop_all():  # the stage ends as failed
                    raise outcome.error
            elif outcome.error is not None:
                raise outcome.error
            elif log.add(output, record):
                bar.grow(record.planned - planned[output])
                planned[output] = record.planned
                bar.advance(note=f"{output.name}: epoch {record.epoch}")
        log.finish()
    return failed


def _finish(whole: Workspace, combination: Combination, part: Config, error: FullfieldError | None) -> tuple[Entry, int]:
    """Take the trained network, segment and evaluate; the scores, and 1 where something failed, else 0."""
    try:
        with open_within(whole, part) as workspace:
            if error is not None:
                raise error
            failure = run_stages(workspace)
            workspace.run.log_params({"sweep": combination.values})
            wanted = {case.slide_id for case in workspace.annotated((_SPLIT,))}
    except FullfieldError as trouble:
        console.print(f"failed: {combination.name}: {trouble}")
        return Entry(combination.name, combination.values, {}, str(trouble)), 1
    metrics = part.output / "metrics.json"
    if not metrics.exists():
        return Entry(combination.name, combination.values, {}, "no validation slide was segmented"), 1
    scores = json.loads(metrics.read_text(encoding="utf-8"))[_SPLIT]
    reason = "" if wanted <= scores.keys() else "scored on a part of the validation slides"
    return Entry(combination.name, combination.values, scores[POOLED], reason), failure


def _publish(workspace: Workspace, entries: Sequence[Entry]) -> None:
    write_scoreboard(workspace.output, entries)
    for name in _FILES:
        if (workspace.output / name).exists():
            workspace.run.log_file(workspace.output / name)
    best = entries[0]
    workspace.run.log_metrics({"best dice": best.dice})
    workspace.run.note("fullfield.best", best.name if best.dice is not None else "")
    shown = new_table("Validation slides, the best first", "combination", "mean Dice")
    for entry in entries:
        shown.add_row(
            entry.name, entry.status if entry.dice is None else f"{entry.dice:.3f}{entry.reason and ', ' + entry.reason}"
        )
    show(shown)
    for remark in _remarks(workspace.output, entries):
        console.print(remark)


def _remarks(output: Path, entries: Sequence[Entry]) -> Iterator[str]:
    """Which combinations are scored at another scale than the best is."""
    tallies = {entry.name: read_tally(output / entry.name / TALLY) for entry in entries if entry.dice is not None}
    best = next(iter(tallies), "")
    for name, tally in tallies.items():
        if tally.mpp != tallies[best].mpp:
            yield f"{best}, {name}: {scale_remark(tallies[best], tally)}"
