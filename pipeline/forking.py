"""Where workers of this machine come from: a process that has imported what they need, and forks.

    command ------ imports Dask ------ tasks ------------->
       `-- fork server -- imports ----+-- worker ---------->
                                      `-- worker ---------->

Started by themselves, workers would import for a second each, once the command is ready for them; forked, they begin with
it all, and share its memory. Where a fork is not safe (everywhere but on Linux), they are started by themselves.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

METHOD = "forkserver" if sys.platform == "linux" else "spawn"
"""How multiprocessing shall start workers."""


def start_forking(environment: Mapping[str, str]) -> None:
    """Start this process's fork server, if it has none, with `environment` in place before its first allocation.

    It finds modules where this process does, and not first, as Python by itself would, in the folder in which the command
    was given: that may have a `pipeline` of its own.
    """
    if METHOD == "forkserver":
        from multiprocessing import forkserver, set_forkserver_preload

        set_forkserver_preload(["pipeline.preloaded"])
        places = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
        with _set({**environment, **places}), _at_ctrl_c(signal.SIG_IGN):  # which is the command's, that ends its workers
            forkserver.ensure_running()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of a block, which would leave a half-started cluster that cannot be closed."""
    came: list[int] = []
    with _at_ctrl_c(lambda number, _: came.append(number)):
        yield
    if came:
        raise KeyboardInterrupt


@contextmanager
def _at_ctrl_c(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """Do something else at Ctrl-C, in the only thread that it interrupts; what is started in the block inherits SIG_IGN."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
