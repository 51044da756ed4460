"""Tasks and how they end, whoever runs them: any `Cluster`, of which the simplest is this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Task = tuple[Any, Callable[..., Any], tuple[Any, ...]]
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

    def workers(self) -> int:
        """How many tasks can run at once, at this moment."""

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

        One with an error is the last of its key; the others go on. Where a worker dies, its tasks begin again, and what they
        yielded before may come twice.
        """


def values(cluster: Cluster) -> list[Any]:
    """The values of all tasks that are under way, in the order in which they end. The first error is raised here."""
    found = []
    for outcome in cluster:
        if outcome.error is not None:
            raise outcome.error
        found.append(outcome.value)
    return found


class Here:
    """Runs each task in this process when its outcome is asked for; see Cluster."""

    description = "this process"

    def __init__(self) -> None:
        self._waiting: deque[Task] = deque()

    def workers(self) -> int:
        """See Cluster."""
        return 1

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """See Cluster."""
        self._waiting.append((key, function, arguments))

    def prepare(self, function: Callable[..., Any], *arguments: Any) -> None:
        """This process does it when it needs it."""

    def cancel(self, key: Any) -> None:
        """See Cluster."""
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
        """See Cluster."""
        return function(*arguments)

    def streams(self, tasks: Mapping[Any, tuple[Callable[..., Iterator[Any]], tuple[Any, ...]]]) -> Iterator[Outcome]:
        """See Cluster."""
        for key, (function, arguments) in tasks.items():
            try:
                for record in function(*arguments):
                    yield Outcome(key, record)
            except Exception as error:  # noqa: BLE001 - as on a worker: the error is the outcome
                yield Outcome(key, error=error)
