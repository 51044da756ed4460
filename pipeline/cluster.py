"""Where the work is done: in this process, by workers on this machine, or by a Dask cluster at an address.

Tasks return numbers, never pixels. Workers of this machine share its cores: torch threads times workers is their number.
Two of Dask's defaults for worker processes are overridden, since together they cost a forward pass half its speed: one
thread for numerical libraries, and an allocator that gives every activation back to the kernel.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any, Protocol

from pipeline.config import ClusterSettings
from pipeline.errors import ClusterError

_KEEP_BYTES = 1 << 34  # memory that the allocator may keep instead of giving it back
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>
_TOP_PAD_BYTES = 1 << 26
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """How one task ended: with a `value`, or with an `error`."""

    key: Any
    value: Any = None
    error: BaseException | None = None


class Cluster(Protocol):
    """Runs tasks. Iterating yields the Outcome of each as it ends, and more may be submitted meanwhile."""

    description: str

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Run function(*arguments) somewhere; its Outcome will carry `key`."""

    def cancel(self, key: Any) -> None:
        """Drop the tasks of `key` that have not begun; none of them has an Outcome any more."""

    def __iter__(self) -> Iterator[Outcome]:
        """Outcomes in the order in which tasks end, until none is under way."""

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """What a generator function yields, somewhere, as it yields it. Its error is raised here."""


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[Cluster]:
    """The cluster that the settings ask for; workers that were started for it end with it."""
    if settings.scheduler is None and settings.workers == 0:
        keep_memory()
        yield _Here()
        return
    if settings.scheduler is not None:
        with _client(settings.scheduler) as client:
            yield _Dask(client, f"Dask at {settings.scheduler}, dashboard {client.dashboard_link}")
        return
    from distributed import Client

    with _local_cluster(settings.workers) as local, Client(local) as client:
        yield _Dask(client, f"{len(local.workers)} local Dask worker(s), dashboard {local.dashboard_link}")


def _client(scheduler: str) -> Any:
    from distributed import Client

    try:
        return Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        remedy = "Start one with `dask scheduler`, or leave `cluster.scheduler` out for workers on this machine."
        raise ClusterError(f"cluster.scheduler {scheduler}", f"no answer ({error})", "a Dask scheduler", remedy) from error


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Let this process's allocator keep freed memory for the next activation. Without effect where there is no glibc."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in (
            (_M_ARENA_MAX, 1),
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_TOP_PAD, _TOP_PAD_BYTES),
        ):
            libc.mallopt(parameter, value)


def _local_cluster(workers: int | None) -> Any:
    import dask
    from distributed import LocalCluster

    count = workers or 1
    with dask.config.set({"distributed.nanny.pre-spawn-environ": worker_environment(max(cores() // count, 1))}):
        # No limit of memory: tasks return numbers, so there is nothing to spill, and a worker that keeps its memory for the
        # next activation would be paused for ever.
        return LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
        )


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a worker process, in place before its first allocation."""
    # Without tcache the few bytes that alignment cuts off an activation join it again when it is freed: its gap is then
    # large enough for the next one of its size. The heap of a small FCN grows by a tenth less, in no more time.
    tunables = {"mmap_max": 0, "trim_threshold": _KEEP_BYTES, "top_pad": _TOP_PAD_BYTES, "arena_max": 1, "tcache_count": 0}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **{name: str(threads) for name in names},
        "MALLOC_TRIM_THRESHOLD_": str(_KEEP_BYTES),
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items()),
    }


class _Here:
    """Runs each task in this process when its outcome is asked for."""

    description = "this process"

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        self._waiting.append((key, function, arguments))

    def cancel(self, key: Any) -> None:
        self._waiting = deque(task for task in self._waiting if task[0] != key)

    def __iter__(self) -> Iterator[Outcome]:
        while self._waiting:
            key, function, arguments = self._waiting.popleft()
            try:
                outcome = Outcome(key, function(*arguments))
            except Exception as error:  # noqa: BLE001 - as on a worker: the error is the outcome
                outcome = Outcome(key, error=error)
            yield outcome

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        return function(*arguments)


class _Dask:
    """Runs tasks on the workers of a Dask scheduler."""

    def __init__(self, client: Any, description: str) -> None:
        from distributed import as_completed

        self.description = description
        self._client = client
        self._keys: dict[Any, Any] = {}
        self._ended = as_completed([])

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        future = self._client.submit(function, *arguments, key=f"{function.__name__}-{uuid.uuid4().hex}")
        self._keys[future] = key
        self._ended.add(future)

    def cancel(self, key: Any) -> None:
        futures = [future for future, its_key in self._keys.items() if its_key == key]
        for future in futures:
            del self._keys[future]
        self._client.cancel(futures)

    def __iter__(self) -> Iterator[Outcome]:
        while self._keys:
            future = next(self._ended)
            if future in self._keys:
                key, error = self._keys.pop(future), future.exception()
                yield Outcome(key, None if error else future.result(), error)

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        topic, records = f"{function.__name__}-{uuid.uuid4().hex}", Queue[Any]()
        self._client.subscribe_topic(topic, lambda event: records.put(pickle.loads(event[1])))
        future = self._client.submit(_tell, topic, function, arguments, key=f"stream-{topic}")
        while not (future.done() and records.empty()):
            try:
                yield records.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
        self._client.unsubscribe_topic(topic)
        future.result()


def _tell(topic: str, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    """Send what a generator yields to all who listen to `topic`; events overtake neither each other nor the task's end.

    It ends early once its client is gone: the same command, called again, does not find it still at work.
    """
    from distributed import get_worker

    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    for record in function(*arguments):
        worker.log_event(topic, pickle.dumps(record))
        if task.state == "cancelled":
            return
