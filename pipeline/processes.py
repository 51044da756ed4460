"""Several processes that run one function together, on one machine or on several; what the first yields comes back.

Processes of their own, not those of multiprocessing nor of Fabric's launchers: work is done in a Dask worker, a daemonic
process, which may have no children of that kind, and whose own command line starts no second one of it. So each is a plain
`python -m pipeline.processes`, told its place by the environment variables that torch.distributed and Lightning read.
It gets its task through a pipe that stays open, so that it ends with who started it, however that ends.

On several machines the task that a Dask worker runs finds other workers, and starts the processes of their machines there.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, cast
from urllib.parse import urlparse

from pipeline.dask_cluster import run_ready
from pipeline.errors import ClusterError, FullfieldError, WorkerError
from pipeline.machine import threads, worker_environment
from pipeline.origin import source_digest

_Task = tuple[Callable[..., Iterator[Any]], tuple[Any, ...]]


@dataclass(frozen=True)
class Meeting:
    """Where processes find each other, and how many they are: `devices` on each of `nodes` machines."""

    host: str
    port: int
    devices: int
    nodes: int

    def environment(self, node: int, device: int) -> dict[str, str]:
        """What tells a process its place."""
        return {
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            "WORLD_SIZE": str(self.devices * self.nodes),
            "NODE_RANK": str(node),
            "LOCAL_RANK": str(device),
            "RANK": str(node * self.devices + device),
        }


def together(function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], devices: int, nodes: int) -> Iterator[Any]:
    """What `function(*arguments)` yields in the first of `devices` times `nodes` processes, which all run it.

    All end once one of them fails. Its error is raised here; WorkerError where it died without one, ClusterError where there
    are not as many machines, and CodeError where one of them has other code.
    """
    task = function, arguments
    if nodes == 1:
        yield from _run(task, 0, Meeting("127.0.0.1", _free_port(), devices, nodes), [])
        return
    with _machines(task, devices, nodes) as (meeting, others):
        yield from _run(task, 0, meeting, others)


def _run(task: _Task, node: int, meeting: Meeting, others: Sequence[Connection]) -> Iterator[Any]:
    """The processes of this machine, and what they and other machines tell."""
    with ExitStack() as stack:
        processes = dict(stack.enter_context(_process(task, meeting, node, device)) for device in range(meeting.devices))
        ends = {*processes, *others}
        while ends:
            errors = []
            for end in cast(list[Connection], wait(ends)):
                try:
                    told = end.recv()
                except EOFError:
                    ends.remove(end)
                    told = _how_it_ended(processes.get(end))
                if isinstance(told, BaseException):
                    errors.append(told)
                elif told is not None:
                    yield told
            if errors:
                raise _cause(errors)


@contextmanager
def _process(task: _Task, meeting: Meeting, node: int, device: int) -> Iterator[tuple[Connection, subprocess.Popen[bytes]]]:
    """A process under way, and the end of the pipe by which it tells; it is killed as the block ends."""
    receiver, sender = Pipe(duplex=False)
    command, environment = [sys.executable, "-m", __name__, str(sender.fileno())], _environment(meeting, node, device)
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=[sender.fileno()])
    sender.close()
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):  # of one that has ended already, as `_how_it_ended` tells
            process.stdin.write(pickle.dumps(task))
            process.stdin.flush()
        yield receiver, process
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):  # what it has not read
            process.stdin.close()
        receiver.close()


def _environment(meeting: Meeting, node: int, device: int) -> dict[str, str]:
    """That of a process, which has its share of the threads of this one."""
    return {
        **os.environ,
        **worker_environment(max(threads() // meeting.devices, 1)),
        **meeting.environment(node, device),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def _cause(errors: Sequence[BaseException]) -> BaseException:
    """The error that says what to do, before those of processes that only lost sight of it."""
    return next(
        (error for error in errors if isinstance(error, FullfieldError) and not isinstance(error, WorkerError)), errors[0]
    )


def _how_it_ended(process: subprocess.Popen[bytes] | None) -> WorkerError | None:
    if process is None or process.wait() == 0:
        return None
    subject, found = f"process {process.pid} of several", f"an end with code {process.returncode}"
    remedy = "Most often memory ran out: choose fewer training.devices, smaller patches or a smaller batch."
    return WorkerError(subject, found, "one that ends well", remedy)


@contextmanager
def _machines(task: _Task, devices: int, nodes: int) -> Iterator[tuple[Meeting, list[Connection]]]:
    """Other machines at work on the same task, and an end of a pipe for each, which tells of its error.

    Who waits for machines leaves its worker free for the processes of others: two trainings that take half of the machines
    each, and wait for the other half, would wait for ever.
    """
    from distributed import Lock, get_worker, worker_client

    try:
        own = get_worker().address
    except ValueError:
        raise _too_few(nodes, "work that is done in this process") from None
    with worker_client() as client, Lock("fullfield-machines"):
        addresses = _others(own, client.nthreads())
        if len(addresses) + 1 < nodes:
            raise _too_few(nodes, f"{len(addresses) + 1} worker(s)")
        meeting = Meeting(_host(own), _free_port(), devices, nodes)
        futures = [
            client.submit(run_ready, source_digest(), _join, (task, node, meeting), workers=[address], pure=False)
            for node, address in enumerate(addresses[: nodes - 1], 1)
        ]
        yield meeting, [_errors_of(future) for future in futures]


def _too_few(nodes: int, found: str) -> ClusterError:
    remedy = "Start a Dask worker on each machine and say cluster.scheduler, or lower training.nodes."
    return ClusterError(f"training.nodes {nodes}", found, f"{nodes} Dask workers, one on each machine", remedy)


def _others(own: str, addresses: Iterable[str]) -> list[str]:
    """The other workers, in the order in which they are asked: first one on each machine."""
    seen, order = Counter([_host(own)]), list[tuple[int, str]]()
    for address in sorted(set(addresses) - {own}):
        order.append((seen[_host(address)], address))
        seen[_host(address)] += 1
    return [address for _, address in sorted(order)]


def _join(task: _Task, node: int, meeting: Meeting) -> None:
    """Run the processes of one more machine to their end."""
    deque(_run(task, node, meeting, []), maxlen=0)


def _errors_of(future: Any) -> Connection:
    receiver, sender = Pipe(duplex=False)

    def tell(ended: Any) -> None:
        if ended.status == "error":
            sender.send(ended.exception())
        sender.close()

    future.add_done_callback(tell)
    return receiver


def _host(address: str) -> str:
    return urlparse(address).hostname or "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _main() -> None:
    """One of the processes: runs the task that comes in through its standard input, and tells whoever started it."""
    end = Connection(int(sys.argv[1]), readable=False)
    try:
        function, arguments = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        for record in function(*arguments):
            if os.environ["RANK"] == "0":
                end.send(record)
    except Exception as error:  # noqa: BLE001 - as on a worker: the error is the outcome
        if not isinstance(error, FullfieldError):
            error.add_note(traceback.format_exc())
        end.send(error)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    _main()
