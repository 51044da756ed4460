"""Where workers of this machine come from: a process that has imported what they need, and forks.

    command ------ imports Dask ------ tasks ------------->
       `-- fork server -- imports ----+-- worker ---------->
                                      `-- worker ---------->

Started by themselves, workers would import for a second each, once the command is ready for them; forked, they begin with
it all, and share its memory. Where a fork is not safe (everywhere but on Linux) or fails, they are started by themselves.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def start_forking(environment: Mapping[str, str]) -> str:
    """Start this process's fork server, if it has none, with `environment` in place before its first allocation.

    It finds modules where this process does, and not first, as Python by itself would, in the folder in which the command
    was given: that may have a `pipeline` of its own. Returns how multiprocessing shall start workers: `forkserver`, or
    `spawn` where there is none, or it cannot be reached, as where TMPDIR is too long for the name of a socket.
    """
    if sys.platform != "linux":
        return "spawn"
    from multiprocessing import forkserver, resource_tracker, set_forkserver_preload

    set_forkserver_preload(["pipeline.preloaded"])
    places = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    with _set({**environment, **places}), uninterrupted():
        resource_tracker.ensure_running()  # before, since it lets Ctrl-C through, and the fork server would start it
        try:
            with _held_back():
                forkserver.ensure_running()
        except OSError:
            return "spawn"
    return "forkserver"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of a block, which would leave a half-started cluster that cannot be closed."""
    if threading.current_thread() is not threading.main_thread():  # the only one that they interrupt
        yield
        return
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    for number in came:
        signal.raise_signal(number)


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, which batch systems send when a job's time is up, raises KeyboardInterrupt in a block of the main thread.

    A second one, as where a job's processes get it one by one and together, lets what the first began come to its end. A
    block that SIGTERM ended raises SystemExit(143).
    """
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except BaseException as error:
        if not came:
            raise
        if isinstance(error, Exception):  # else nobody would hear what went wrong as it ended
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _held_back() -> Iterator[None]:
    """What is started in the block does not get Ctrl-C, which is the command's, before it says so: see preloaded.py."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
