"""Runs a command and says what it took: seconds, seconds of processor, and memory of the largest of its processes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread, Timer

import psutil

_ROOT = Path(__file__).parents[1]
_POLL_SECONDS = 0.2
_SET_BY_OTHERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True)
class Usage:
    """What a command took, children included: wall and processor seconds, and bytes that its largest process held.

    `error` is the last line that it complained with; "" where it ended well.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str
    error: str


def measure(command: Sequence[str | Path], environment: Mapping[str, str], patience: float = 3 * 3600) -> Usage:
    """Run a command in this process's environment, less what sets threads and allocator, and with `environment`.

    After `patience` seconds it is taken to hang, and ended.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _SET_BY_OTHERS}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as complaints:
        started = time.perf_counter()
        process = subprocess.Popen(command, env={**kept, **environment}, cwd=_ROOT, stdout=output, stderr=complaints)
        peak, ended = _Peak(), Event()
        watcher = Thread(target=peak.watch, args=(process.pid, ended))
        watcher.start()
        timer = Timer(patience, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)  # of the process and of its children, for which it waited
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        timer.cancel()
        ended.set()
        watcher.join()
        output.seek(0)
        said = output.read()
        complaints.seek(0)
        lines = [line for line in (said + "\n" + complaints.read()).splitlines() if line.strip()]
    error = "" if process.returncode == 0 else (lines or ["nothing said"])[-1].strip()
    if process.returncode < 0:
        error = f"ended by signal {-process.returncode} after {seconds:.0f} s"
    # A command does not wait for what its fork server has forked.
    return Usage(seconds, max(used.ru_utime + used.ru_stime, peak.cpu_seconds), peak.bytes, said, error)


class _Peak:
    """The most memory that any process of a tree has held, and what processor time each had used when last seen."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seconds = dict[int, float]()

    @property
    def cpu_seconds(self) -> float:
        """Of all processes together."""
        return sum(self._seconds.values())

    def watch(self, pid: int, ended: Event) -> None:
        """Look again and again. The kernel keeps each process's own peak, so that looking seldom misses nothing."""
        while True:
            with suppress(psutil.Error):
                tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
                self.bytes = max([self.bytes, *(_high_water(process.pid) for process in tree)])
                self._seconds |= {process.pid: sum(process.cpu_times()[:2]) for process in tree}
            if ended.wait(_POLL_SECONDS):
                return


def _high_water(pid: int) -> int:
    """Bytes that a process has held at its peak; 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
