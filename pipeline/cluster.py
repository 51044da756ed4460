"""Where the work is done: in this process, by workers on this machine, or by a Dask cluster at an address.

Tasks return numbers, never pixels. Workers of this machine share its cores: torch threads times workers is their number.
Two of Dask's defaults for worker processes are overridden, since together they cost a forward pass half its speed: one
thread for numerical libraries, and an allocator that gives every activation back to the kernel. And workers are not woken
156 times a second, by which Dask watches itself, but seven times (`wake_ups_a_second` in tests/test_cluster.py).
They are forked, where that is safe, so that they are ready sooner: see forking.py.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import ClusterSettings
from pipeline.errors import ClusterError, WorkerError
from pipeline.forking import METHOD, start_forking, uninterrupted
from pipeline.machine import cores, keep_memory, worker_environment
from pipeline.origin import source_digest
from pipeline.progress import console

if TYPE_CHECKING:
    from distributed import KilledWorker

_POLL_SECONDS = 0.5
_UNWATCHED = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "500ms"}
"""Of Dask's settings: it would look at its workers a hundred times a second, for profiles that nobody sees here."""
_DEATHS = 2  # of local workers, before a task is tried alone, and again before it is given up

_Task = tuple[Any, Callable[..., Any], tuple[Any, ...]]
"""Key, function and arguments."""


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

    def prepare(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run function(*arguments) on every worker that is there, beside other work. It has no Outcome."""

    def cancel(self, key: Any) -> None:
        """Drop the tasks of `key` that have not begun; none of them has an Outcome any more."""

    def __iter__(self) -> Iterator[Outcome]:
        """Outcomes in the order in which tasks end, until none is under way."""

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """What a generator function yields, somewhere, as it yields it. Its error is raised here."""

    def streams(self, tasks: Mapping[Any, tuple[Callable[..., Iterator[Any]], tuple[Any, ...]]]) -> Iterator[Outcome]:
        """The same of several, by key, side by side as far as there are workers: an Outcome for each thing yielded.

        One with an error is the last of its key; the others go on.
        """


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[Cluster]:
    """The cluster that the settings ask for; workers that were started for it end with it."""
    if settings.scheduler is None and settings.workers == 0:
        keep_memory()
        yield _Here()
        return
    if settings.scheduler is None:
        start_forking(worker_environment(1))  # its imports go on beside those of this process
    from distributed import Client
    from distributed.utils import silence_logging_cmgr

    if settings.scheduler is not None:
        with silence_logging_cmgr("CRITICAL"), _client(settings.scheduler) as client:
            _meet_workers(client, settings.scheduler)
            yield _Dask(client, f"Dask at {settings.scheduler}, dashboard {client.dashboard_link}")
        return
    local = _local_cluster(settings.workers)
    try:
        with Client(local) as client:
            yield _Dask(client, f"{len(local.workers)} local Dask worker(s)")
    finally:
        with suppress(TimeoutError):  # on a busy machine: workers that are slow to end will end with this process
            local.close()


def _client(scheduler: str) -> Any:
    from distributed import Client

    try:
        return Client(scheduler, timeout="20s")
    except (OSError, ValueError, TypeError) as error:  # the last for tls:// where Dask knows no certificate
        remedy = "Start one with `dask scheduler`, or leave `cluster.scheduler` out for workers on this machine."
        raise ClusterError(f"cluster.scheduler {scheduler}", f"no answer ({error})", "a Dask scheduler", remedy) from error


def _meet_workers(client: Any, scheduler: str) -> None:
    """Wait until there is a worker. Raises ClusterError where one has other code than this process, or none: labels would be
    of both.

    What a worker has, it tells of the moment in which it was first asked, so that it has to be started again to have newer.
    """
    if not client.nthreads():
        console.print(f"Waiting for a worker of {scheduler}: `dask worker {scheduler}` starts one")
    client.wait_for_workers(1)
    found = client.run(source_digest, on_error="return")  # an ImportError of those that have no Fullfield
    if others := sorted(worker for worker, digest in found.items() if digest != source_digest()):
        remedy = "Install the same there as here, and start these workers again."
        raise ClusterError(f"workers {', '.join(others)}", "other code of Fullfield, or none", "this command's", remedy)


def _local_cluster(workers: int | None) -> Any:
    import dask
    from distributed import LocalCluster

    count = workers or 1
    start = {
        "distributed.worker.multiprocessing-method": METHOD,  # of the first; those that replace them start by themselves
        "distributed.nanny.environ": dict(os.environ),  # the fork server may be older than some of it
        "distributed.nanny.pre-spawn-environ": worker_environment(max(cores() // count, 1)),
    }
    with dask.config.set({**start, **_UNWATCHED}), uninterrupted():
        # No limit of memory: tasks return numbers, so there is nothing to spill, and a worker that keeps its memory for the
        # next activation would be paused for ever.
        return LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={
                "dashboard": False,  # to import what draws it takes longer than to import all of Dask
                "allowed_failures": _DEATHS - 1,
            },
            silence_logs="CRITICAL",
        )


class _Here:
    """Runs each task in this process when its outcome is asked for."""

    description = "this process"

    def __init__(self) -> None:
        self._waiting: deque[_Task] = deque()

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        self._waiting.append((key, function, arguments))

    def prepare(self, function: Callable[..., Any], *arguments: Any) -> None:
        """This process does it when it needs it."""

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

    def streams(self, tasks: Mapping[Any, tuple[Callable[..., Iterator[Any]], tuple[Any, ...]]]) -> Iterator[Outcome]:
        for key, (function, arguments) in tasks.items():
            try:
                for record in function(*arguments):
                    yield Outcome(key, record)
            except Exception as error:  # noqa: BLE001 - as on a worker: the error is the outcome
                yield Outcome(key, error=error)


class _Dask:
    """Runs tasks on the workers of a Dask scheduler."""

    def __init__(self, client: Any, description: str) -> None:
        self.description = description
        self._client = client
        self._tasks: dict[Any, _Task] = {}  # by their futures
        self._preparing: list[Any] = []  # futures, which would be dropped if nobody held them
        self._suspects: deque[_Task] = deque()
        self._ended = Queue[Any]()

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        self._start((key, function, arguments))

    def prepare(self, function: Callable[..., Any], *arguments: Any) -> None:
        workers = self._client.scheduler_info()["workers"]
        self._preparing += [self._client.submit(function, *arguments, workers=[one], pure=False) for one in workers]

    def cancel(self, key: Any) -> None:
        futures = [future for future, task in self._tasks.items() if task[0] == key]
        for future in futures:
            del self._tasks[future]
        self._suspects = deque(task for task in self._suspects if task[0] != key)
        self._client.cancel(futures)

    def __iter__(self) -> Iterator[Outcome]:
        alone = None  # the future of a suspect that runs while nothing else does
        while self._tasks or self._suspects:
            if not self._tasks:
                alone = self._start(self._suspects.popleft())
            future = self._next_ended()
            if future not in self._tasks:
                continue
            task = self._tasks.pop(future)
            outcome = self._outcome(task[0], future)
            if isinstance(outcome.error, WorkerError) and future is not alone:
                # Dask blames all tasks that a dead worker had, so those that it gives up are tried again one by one.
                self._suspects.append(task)
            else:
                yield outcome

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        for outcome in self.streams({None: (function, arguments)}):
            if outcome.error is not None:
                raise outcome.error
            yield outcome.value

    def streams(self, tasks: Mapping[Any, tuple[Callable[..., Iterator[Any]], tuple[Any, ...]]]) -> Iterator[Outcome]:
        told, running = Queue[Outcome](), dict[Any, tuple[str, Any]]()
        for key, (function, arguments) in tasks.items():
            topic = f"{function.__name__}-{uuid.uuid4().hex}"
            self._client.subscribe_topic(topic, partial(_hear, told, key))
            running[key] = topic, self._client.submit(_tell, topic, function, arguments, key=f"stream-{topic}")
        while running:
            ended = [key for key, (_, future) in running.items() if future.done()]  # before all that they told is taken
            with suppress(Empty):
                yield told.get(timeout=0 if ended else _POLL_SECONDS)
                while True:
                    yield told.get_nowait()
            self._check()
            for key in ended:
                topic, future = running.pop(key)
                outcome = self._outcome(key, future)
                self._client.unsubscribe_topic(topic)
                if outcome.error is not None:
                    yield outcome

    def _start(self, task: _Task) -> Any:
        self._check()
        _, function, arguments = task
        future = self._client.submit(function, *arguments, key=f"{function.__name__}-{uuid.uuid4().hex}")
        self._tasks[future] = task
        future.add_done_callback(self._ended.put)
        return future

    def _next_ended(self) -> Any:
        """The next future that is done. Raises ClusterError where the scheduler is lost, since then none ever is."""
        while True:
            try:
                return self._ended.get(timeout=_POLL_SECONDS)
            except Empty:
                self._check()

    def _outcome(self, key: Any, future: Any) -> Outcome:
        """How a task ended. Raises ClusterError where nobody knows, since the scheduler is lost."""
        from distributed import KilledWorker

        try:
            return Outcome(key, future.result())
        except KilledWorker as error:
            return Outcome(key, error=_deadly(error))
        except Exception as error:  # noqa: BLE001 - whatever the task raised is its outcome
            if future.status != "error":
                raise self._lost() from error
            return Outcome(key, error=error)

    def _check(self) -> None:
        """Raise ClusterError where the scheduler is lost."""
        if self._client.status != "running":
            raise self._lost()

    def _lost(self) -> ClusterError:
        remedy = "Start a scheduler and workers, and run the same command again: it goes on from what is done."
        return ClusterError(self.description, "a scheduler that no longer answers", "one that lives on", remedy)


def _deadly(error: KilledWorker) -> WorkerError:
    task, tries = str(error.task).rpartition("-")[0], error.allowed_failures + 1
    return WorkerError(
        f"{task} on {error.last_worker.address}",
        f"{tries} worker processes that died of it, one after the other",
        "one that lives on",
        "Most often memory ran out: set a lower `cluster.worker_memory_gib` or a smaller `segmentation.tile_size` "
        "(--tile-size), delete this slide's output, and run again. Otherwise the worker's log may say why.",
    )


def _hear(told: Queue[Outcome], key: Any, event: tuple[float, bytes]) -> None:
    told.put(Outcome(key, pickle.loads(event[1])))


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
