"""How fast a slide is segmented, in how much memory, beside the bare forward pass and other tools: `make bench`.

    python -m benchmarks.bench [SECTION...] [--size 8192] [--runs 3] [--networks fcn,unet] [--slides DIR] [--results DIR]
                               [--pyfast PYTHON]

    peers    all contenders on a slide of tissue; on one of twice the side those that may be as fast
    big      four times the side, 30 % tissue
    growth   one, two, four and eight times the side, 30 % tissue, with one worker and with two
    huge     sixteen times the side, 2 % tissue
    dense    a patch classifier made convolutional, beside the same run patch by patch

Contenders take turns, each in a process of its own. Every run is kept as it ends, in SECTION.json in the folder --results
(benchmarks/results), and bench.md and bench.png are drawn from these files. Called again, the bench goes on where it
stopped; but a section that was measured on another machine, with other versions or with other code is measured anew. pyFAST
takes part where PYTHON, or the environment variable FULLFIELD_PYFAST, names an interpreter that has it, and the library onnx
is installed in this one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir

from benchmarks.contenders import CONTENDERS, Task, inside
from benchmarks.models import NETWORKS, make_model
from benchmarks.process import Usage, measure
from benchmarks.record import RESULTS, Key, Plan, Record, Run
from benchmarks.report import SECTIONS, write_report
from benchmarks.slides import make_slide
from pipeline.machine import cores, worker_environment

_OURS = ("fullfield, exact", "fullfield, fast", "fullfield, fastest")
_LIMITS = ("limit, exact", "limit, fast", "limit, fastest")
_ONCE = "MONAI PatchInferer, AvgMerger, allocator tuned"  # of the big slide, where a run of it takes most of an hour


@dataclass(frozen=True)
class Contest:
    """One slide, `scale` times the side of the smallest, and who segments it, with how many workers (0: as usual)."""

    scale: int
    share: float
    contenders: tuple[str, ...]
    workers: tuple[int, ...] = (0,)


CONTESTS = {
    "peers": (Contest(1, 1.0, tuple(CONTENDERS)), Contest(2, 1.0, (*_OURS, "pyFAST"))),
    "big": (
        Contest(4, 0.3, (*_OURS, *_LIMITS, "MONAI SlidingWindowInferer, allocator tuned", _ONCE, "pyFAST")),
    ),
    "growth": tuple(Contest(scale, 0.3, ("fullfield, exact",), (2, 1)) for scale in (1, 2, 4, 8)),
    "huge": (Contest(16, 0.02, ("fullfield, exact",)),),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What was asked for: side of the smallest slide in pixels, runs of each contender, networks, folders, interpreter."""

    size: int
    runs: int
    networks: tuple[str, ...]
    folder: Path
    results: Path
    pyfast: Path | None


def main() -> None:
    """Run the sections that are named, all if none is, and draw what was measured after each."""
    sections, bench = _asked()
    for section in sections:
        record = Record(bench.results / f"{section}.json")
        if section == "dense":
            _dense(record)
        for contest in CONTESTS.get(section, ()):
            for network in bench.networks:
                _run(bench, contest, network, record)
        write_report(bench.results)
    print((bench.results / "bench.md").read_text(encoding="utf-8"))


def _run(bench: Bench, contest: Contest, network: str, record: Record) -> None:
    """Let the contenders of one slide take turns with one network; what is in the record already is not run again."""
    tasks = {task.key: task for task in _tasks(bench, contest, network)}
    if all(_done(record, key, bench.runs) for key in tasks):
        return
    first = _prepared(next(iter(tasks.values())), record)
    for turn in range(bench.runs):
        for key, task in tasks.items():
            if not _done(record, key, turn + 1):
                size = _tile_size(record, key) or first.tile_size
                found = _refused(first, record, key) or CONTENDERS[key.contender](replace(task, tile_size=size))
                record.add(found)
                print(_said(found), flush=True)


def _tasks(bench: Bench, contest: Contest, network: str) -> Iterator[Task]:
    size = contest.scale * bench.size
    model, slide = make_model(bench.folder / "models", network), make_slide(bench.folder, size, contest.share)
    reference = bench.folder / f"{slide.stem}-{network}.npy"
    contenders = [name for name in contest.contenders if name != "pyFAST" or bench.pyfast is not None]
    for workers in contest.workers:
        for contender in contenders:
            key = Key(size, contest.share, network, contender, workers)
            yield Task(key, slide, model, reference, bench.folder, 0, bench.pyfast)


def _prepared(task: Task, record: Record) -> Task:
    """The task with the tile size that `fullfield plan` would choose; the labels of one forward pass are made as well.

    They come from tiles: that these give one pass over the whole is what the tests and `fullfield verify` show.
    """
    command = [sys.executable, "-m", "workflows", "plan", str(task.slide), "--model", str(task.model), "--json"]
    used = measure(command, task.cache)
    if used.error:
        sys.exit(f"{' '.join(command)}: {used.error}")
    found = json.loads(used.output)
    names = ("tile_size", "halo_cost", "seconds", "peak_bytes")
    plan = Plan(task.key.size, task.key.share, task.key.network, *(found[name] for name in names))
    if not any((old.size, old.share, old.network) == (plan.size, plan.share, plan.network) for old in record.plans):
        record.add(plan)
    chosen = replace(task, tile_size=plan.tile_size)
    if not task.reference.exists():
        first = inside("limit", True, "exact", chosen)
        if first.error:
            sys.exit(f"the forward pass that all are compared with: {first.error}")
    return chosen


def _refused(task: Task, record: Record, key: Key) -> Run | None:
    """A run that failed, where Fullfield cannot be run here in the precision that is asked for; else it is approved now."""
    precision = key.contender.rpartition(", ")[2]
    if precision not in ("fast", "fastest"):
        return None
    used = _approval(task, precision)
    if used.error:
        return Run(key, error=used.error)
    remark = f"{key.network}, {precision}, approved by the bench itself: {used.output.strip().splitlines()[-1]}"
    if remark not in record.remarks:
        record.add(remark)
    return None


@lru_cache
def _approval(task: Task, precision: str) -> Usage:
    where = (task.model, task.slide, task.reference)
    return measure(
        [sys.executable, "-m", "benchmarks.approval", *where, precision], {**worker_environment(cores()), **task.cache}
    )


def _done(record: Record, key: Key, runs: int) -> bool:
    """Whether a contender needs no more turns: it had them, or failed, or is one of which a single run is enough."""
    found = record.of(key)
    once = key.contender == _ONCE and key.share < 1
    return len(found) >= (1 if once else runs) or any(run.error for run in found)


def _tile_size(record: Record, key: Key) -> int:
    """The tile size that Fullfield chose last in the same precision: the bare forward pass gets the same windows."""
    twin = replace(key, contender=key.contender.replace("limit", "fullfield"))
    return next((run.tile_size for run in reversed(record.of(twin))), 0)


def _said(run: Run) -> str:
    said = run.error or f"{run.whole:.1f} s, {run.seconds:.1f} after start-up, {run.peak_bytes / 2**30:.2f} GiB"
    key = run.key
    return f"{key.size} px, {key.share:.0%} tissue, {key.network}, {key.contender}, {key.workers or 'usual'} workers: {said}"


def _dense(record: Record) -> None:
    if not record.remarks:
        used = measure([sys.executable, "-m", "benchmarks.dense"], {"OMP_NUM_THREADS": str(cores())})
        record.add(used.error or used.output.strip())


def _asked() -> tuple[list[str], Bench]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", type=_section, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--size", type=int, default=8192, help="side of the smallest slide, a multiple of 1024 px")
    parser.add_argument("--runs", type=int, default=3, help="of each contender; medians count")
    parser.add_argument("--networks", default=",".join(NETWORKS), type=_networks)
    parser.add_argument("--slides", type=Path, default=Path(gettempdir()) / "fullfield-bench", help="where slides are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where runs and tables are kept")
    parser.add_argument("--pyfast", type=Path, default=os.environ.get("FULLFIELD_PYFAST"), help="an interpreter with pyFAST")
    asked = parser.parse_args()
    bench = Bench(asked.size, asked.runs, asked.networks, asked.slides.absolute(), asked.results.absolute(), asked.pyfast)
    return asked.sections or list(SECTIONS), bench


def _section(name: str) -> str:
    if name not in SECTIONS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return name


def _networks(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(NETWORKS):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(NETWORKS)}")
    return names


if __name__ == "__main__":
    main()
