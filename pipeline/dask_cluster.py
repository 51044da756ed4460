"""Tasks on the workers of a Dask scheduler, wherever they are: what becomes of them when workers die, or there are none.

A command ends where a worker runs other code of Fullfield than it does: its labels would come from both.
"""

from __future__ import annotations

import pickle
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from pipeline.errors import ClusterError, CodeError, WorkerError
from pipeline.machine import keep_memory, settle_user_name
from pipeline.origin import source_digest
from pipeline.progress import console
from pipeline.tasks import Outcome, Task

if TYPE_CHECKING:
    from distributed import KilledWorker

_POLL_SECONDS = 0.5
_LOOK_SECONDS, _LONELY_SECONDS = 5.0, 30.0  # from one look for workers to the next; without one, before it is told
_OVER_SECONDS = 300.0  # without a worker of this machine, which are started again within seconds, and by nobody else
_FEWER_WORKERS = "start fewer workers (`cluster.workers`), or some with more memory, and run again"
_SMALLER_TRAINING = "lower training.batch_size, tiles.patch_size or network.width, and run again"


class DaskCluster:
    """Runs tasks on the workers of a Dask scheduler; see Cluster. To the command's `own` nobody else adds workers."""

    def __init__(self, client: Any, description: str, own: bool = False) -> None:
        self.description, self._own = description, own
        self._client = client
        self._tasks: dict[Any, Task] = {}  # by their futures
        self._preparing: list[Any] = []  # futures, which would be dropped if nobody held them
        self._suspects: deque[Task] = deque()  # each to be tried alone
        self._alone: Any = None  # the future of the one that was last tried so
        self._held: list[Task] = []  # what waits until no suspect is left
        self._ended = Queue[tuple[Any, list[Any]]]()  # futures and values
        self._looked = time.monotonic()  # for workers, the last time
        self._missed: float | None = None  # since when there is none
        self._told = False  # of that

    def workers(self) -> int:
        """See Cluster. Raises ClusterError where the scheduler is lost."""
        try:
            return sum(self._client.nthreads().values())
        except OSError as error:
            raise lost(self.description) from error

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """See Cluster."""
        task = key, function, arguments
        if self._suspects or self._held or self._alone in self._tasks:
            self._held.append(task)
        else:
            self._start(task)

    def prepare(self, function: Callable[..., Any], *arguments: Any) -> None:
        """See Cluster."""
        with suppress(OSError):  # of a scheduler that is lost, which those tell who wait for it
            workers = self._client.scheduler_info()["workers"]
            task = source_digest(), function, arguments
            self._preparing += [self._client.submit(run_ready, *task, workers=[one], pure=False) for one in workers]

    def cancel(self, key: Any) -> None:
        """See Cluster."""
        futures = [future for future, task in self._tasks.items() if task[0] == key]
        for future in futures:
            del self._tasks[future]
        self._suspects = deque(task for task in self._suspects if task[0] != key)
        self._held = [task for task in self._held if task[0] != key]
        self._client.cancel(futures)

    def __iter__(self) -> Iterator[Outcome]:
        while self._tasks or self._suspects or self._held:
            if not self._tasks:
                self._go_on()
            future, values = self._next_ended()
            if future not in self._tasks:
                continue
            task = self._tasks.pop(future)
            outcome = Outcome(task[0], values[0]) if values else self._outcome(task[0], future, _FEWER_WORKERS)
            if isinstance(outcome.error, WorkerError) and future is not self._alone:
                # Dask blames all tasks that a dead worker had, so those that it gives up are tried again one by one: soon,
                # since others of the same key may kill workers as well, and their slide is under way in place of another.
                self._suspects.append(task)
                self._hold()
            else:
                yield outcome

    def _hold(self) -> None:
        """Take back what has not begun; what begins at this very moment is run twice, as after the death of a worker."""
        try:
            begun = {key for keys in self._client.processing().values() for key in keys}
            waiting = [future for future in self._tasks if future.key not in begun and not future.done()]
            self._client.cancel(waiting)
        except OSError as error:
            raise lost(self.description) from error
        self._held += [self._tasks.pop(future) for future in waiting]

    def _go_on(self) -> None:
        """Try the next suspect, while nothing else is under way; where none is left, start all that was held."""
        if self._suspects:
            self._alone = self._start(self._suspects.popleft())
            return
        held, self._held = self._held, []
        for task in held:
            self._start(task)

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """See Cluster."""
        for outcome in self.streams({None: (function, arguments)}):
            if outcome.error is not None:
                raise outcome.error
            yield outcome.value

    def streams(self, tasks: Mapping[Any, tuple[Callable[..., Iterator[Any]], tuple[Any, ...]]]) -> Iterator[Outcome]:
        """See Cluster."""
        told, suspects = Queue[Outcome](), deque[Any]()
        running = {key: self._begin(told, key, *task) for key, task in tasks.items()}
        alone = None
        while running or suspects:
            if not running:  # as above: the keys that a dead worker had, one by one
                alone = suspects.popleft()
                running[alone] = self._begin(told, alone, *tasks[alone])
            ended = [key for key, (_, future) in running.items() if future.done()]  # before all that they told is taken
            with suppress(Empty):
                yield told.get(timeout=0 if ended else _POLL_SECONDS)
                while True:
                    yield told.get_nowait()
            self._look_for_workers()
            for key in ended:
                topic, future = running.pop(key)
                outcome = self._outcome(key, future, _SMALLER_TRAINING)
                self._client.unsubscribe_topic(topic)
                if isinstance(outcome.error, WorkerError) and len(tasks) > 1 and key != alone:
                    suspects.append(key)
                elif outcome.error is not None:
                    yield outcome

    def _begin(
        self, told: Queue[Outcome], key: Any, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]
    ) -> tuple[str, Any]:
        """Start a stream that is put into `told`: its topic and its future."""
        topic = f"{function.__name__}-{uuid.uuid4().hex}"
        self._client.subscribe_topic(topic, partial(_hear, told, key))
        return topic, self._client.submit(_tell, topic, source_digest(), function, arguments, key=topic)

    def _start(self, task: Task) -> Any:
        self._check()
        _, function, arguments = task
        key = f"{function.__name__}-{uuid.uuid4().hex}"
        future = self._client.submit(run_ready, source_digest(), function, arguments, key=key)
        self._tasks[future] = task
        self._client.loop.add_callback(self._fetch, future)
        return future

    async def _fetch(self, future: Any) -> None:
        """Put a future among those that are done, with the value if it has one.

        Where a worker dies before its value is here, the task waits among others to be run again, and nobody for it.
        """
        values: list[Any] = []
        with suppress(Exception):  # which `_outcome` meets again
            values = await self._client.gather([future], errors="skip", asynchronous=True)
        self._ended.put((future, values))

    def _next_ended(self) -> tuple[Any, list[Any]]:
        """The next future that is done, and its value; none of a task that failed.

        Raises ClusterError where the scheduler is lost, since then none ever is.
        """
        while True:
            try:
                return self._ended.get(timeout=_POLL_SECONDS)
            except Empty:
                self._look_for_workers()

    def _outcome(self, key: Any, future: Any, remedy: str) -> Outcome:
        """How a task ended; of one that its workers did not survive, `remedy` says what to do where memory ran out.

        Raises ClusterError where nobody knows, since the scheduler is lost, and CodeError where a worker has other code.
        """
        from distributed import KilledWorker

        try:
            return Outcome(key, future.result())
        except KilledWorker as error:
            return Outcome(key, error=_deadly(error, remedy))
        except CodeError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the task raised is its outcome
            if future.status != "error":
                raise lost(self.description) from error
            return Outcome(key, error=error)

    def _check(self) -> None:
        """Raise ClusterError where the scheduler is lost."""
        if self._client.status != "running":
            raise lost(self.description)

    def _look_for_workers(self) -> None:
        """Say so where there has been no worker for a while: it is waited for.

        Raises ClusterError as `_check` does, and where the command's own workers do not come back.
        """
        self._check()
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self.workers():
            self._missed, self._told = None, False
        elif self._missed is None:
            self._missed = now
        elif not self._told and now - self._missed >= _LONELY_SECONDS:
            self._told = True
            console.print(f"No worker is left: {self.description}. Waiting for one")
        elif self._own and now - self._missed >= _OVER_SECONDS:
            remedy = "Run the same command again: it goes on from what is done."
            raise ClusterError(self.description, "no worker that could be started again", "one that is", remedy)


def lost(description: str) -> ClusterError:
    """The error for a scheduler that is gone."""
    remedy = "Start a scheduler and workers, and run the same command again: it goes on from what is done."
    return ClusterError(description, "a scheduler that no longer answers", "one that keeps running", remedy)


def other_code(workers: list[str]) -> CodeError:
    """The error for workers that run other code than the command."""
    remedy = "Install the same there as here, start these workers again, and run the same command again."
    return CodeError(f"workers {', '.join(workers)}", "other code of Fullfield, or none", "this command's", remedy)


def _deadly(error: KilledWorker, remedy: str) -> WorkerError:
    task, tries = str(error.task).rpartition("-")[0], error.allowed_failures + 1
    return WorkerError(
        f"{task} on {error.last_worker.address}",
        f"{tries} worker processes that died of it, one after the other",
        "one that keeps running",
        f"Most often memory ran out: {remedy}. Otherwise the worker's log may say why.",
    )


def _hear(told: Queue[Outcome], key: Any, event: tuple[float, bytes]) -> None:
    told.put(Outcome(key, pickle.loads(event[1])))


def run_ready(code: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call the function, on a worker of the same code. Raises CodeError."""
    _make_ready(code)
    return function(*arguments)


def _tell(topic: str, code: str, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    """Send what a generator yields to all who listen to `topic`; events overtake neither each other nor the task's end.

    It ends early once its client is gone: the same command, called again, does not find it still at work. Raises CodeError.
    """
    from distributed import get_worker

    _make_ready(code)
    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    for record in function(*arguments):
        worker.log_event(topic, pickle.dumps(record))
        if task.state == "cancelled":
            return


def _make_ready(code: str) -> None:
    """Have this worker's allocator keep memory, however the worker was started: Dask has it give back every activation.
    Give its user a name, too.

    Raises CodeError where it has other code: it may have joined late, or have been replaced after an update.
    """
    keep_memory()
    settle_user_name()
    if source_digest() != code:
        from distributed import get_worker

        raise other_code([get_worker().address])
