"""Whose an output folder is: what every command checks and writes there before it begins, alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.cohort import Case, manifest_text, write_manifest
from pipeline.config import Config
from pipeline.config_file import WRITTEN
from pipeline.errors import CheckpointError, CohortError
from pipeline.files import as_unicode, locked, write_text
from pipeline.inputs import check_at_work
from pipeline.progress import console

TABLES = {"folds.csv": "crossval", "sweep.csv": "sweep"}
"""The table that each kind of work of many runs leaves in its output, and the command of that work."""

_ELSEWHERE = "choose another `output`, for instance output=runs/mine (--output of `fullfield reproduce`)."
_RESULTS = ("slides.csv", "metrics.csv", "calibration.csv", *TABLES)


@contextmanager
def alone(config: Config, cases: Sequence[Case]) -> Iterator[None]:
    """Have the output to oneself while the block lasts: what another command is at is not replaced under its hands.

    One of the same cohort and configuration is waited for, with a word; for another, raises CheckpointError at once.
    """
    with ExitStack() as held:
        if not held.enter_context(locked(config.output / "model", wait=False)):
            check_at_work(config, cases)
            console.print(f"Waiting for another command in {config.output}")
            held.enter_context(locked(config.output / "model"))
        yield


def write_setup(config: Config, cases: Sequence[Case]) -> None:
    """Write a configuration, and the cohort with its splits, into its output.

    Raises CohortError where files are there that Fullfield did not write, and would replace.
    """
    check_files(config, cases)
    config.output.mkdir(parents=True, exist_ok=True)
    write_text(config.output / "config.yaml", WRITTEN + config.to_yaml())  # first: it says whose the other one is
    write_manifest(config.output / "cohort.csv", cases)


def check_files(config: Config, cases: Sequence[Case]) -> None:
    """Raise CohortError where files are in the output that Fullfield did not write, and would replace."""
    own, dealt, manifest = config.output / "config.yaml", config.output / "cohort.csv", config.cohort.manifest
    written = own.is_file() and own.read_bytes().startswith(WRITTEN.encode())
    theirs = [own] if own.exists() and not written else []
    another = not _may_hold(dealt, manifest_text(cases))
    if another and not written:
        theirs.append(dealt)
    theirs += [path for path in map(config.output.joinpath, _RESULTS) if _is_same(path, manifest)]
    if theirs:
        found = f"a file that Fullfield did not write, where it writes {theirs[0].name}"
        remedy = f"Call it otherwise, or {_ELSEWHERE}"
        raise CohortError(str(theirs[0]), found, "no file of that name, or Fullfield's own", remedy)
    if another and _is_same(dealt, manifest):  # of an earlier `reproduce`, or edited since
        remedy = f"Keep a manifest of your own elsewhere, or {_ELSEWHERE}"
        raise CohortError(str(dealt), "another cohort than the one to be written", "the same, or no such file", remedy)


def check_owner(output: Path, own: str | None) -> None:
    """Raise CheckpointError where an output is that of another kind of work, whose results would be replaced.

    `own` is the one of TABLES that the caller's work leaves; None for a single run.
    """
    others = {name: verb for name, verb in TABLES.items() if name != own} | ({"model": "run"} if own else {})
    for name, verb in others.items():
        if (output / name).exists():
            remedy = "Choose another `output`, for instance output=runs/mine."
            raise CheckpointError(str(output), f"the results of `fullfield {verb}`", "a folder of its own", remedy)


def require_output(config: Config, verb: str) -> None:
    """Raise CohortError where the output, which an earlier stage makes, is not there: its name may be misspelt."""
    if not config.output.is_dir():
        raise CohortError(str(config.output), "no such folder", "an output", f"Run `fullfield {verb}` first.")


def _may_hold(path: Path, text: str) -> bool:
    """Whether nothing is lost by writing this text into a file, which is not there or holds it already."""
    return not path.exists() or path.read_bytes() == as_unicode(text).encode()


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths, or links, lead to one file that is there."""
    return path.exists() and other.exists() and path.samefile(other)
