"""Where the work is done: in this process, by workers on this machine, or by a Dask cluster at an address.

Tasks return numbers, never pixels. Workers of this machine share its cores: torch threads times workers is their number.
Two of Dask's defaults for worker processes are overridden, since together they cost a forward pass half its speed: one
thread for numerical libraries, and an allocator that gives every activation back to the kernel. And workers are not woken
156 times a second, by which Dask watches itself, but seven times (`wake_ups_a_second` in tests/test_cluster.py).
Where there are several GPUs, each worker computes on another one.
They are forked, where that is safe, so that they are ready sooner: see forking.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from pipeline.dask_cluster import DaskCluster, lost, other_code
from pipeline.errors import ClusterError
from pipeline.forking import start_forking, uninterrupted
from pipeline.machine import UNBOUND, cores, cuda_devices, keep_memory, worker_environment
from pipeline.origin import source_digest
from pipeline.progress import console
from pipeline.settings import ClusterSettings
from pipeline.tasks import Cluster, Here

_UNWATCHED = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "500ms"}
"""Of Dask's settings: it would look at its workers a hundred times a second, for profiles that nobody sees here."""
_REPLACED = {"distributed.deploy.lost-worker-timeout": "365 days"}
"""By default a worker that is not back 15 s after it died, since it died again or starts slowly, is given up for ever."""
_UNHURRIED = {"distributed.scheduler.worker-saturation": 1.0}
"""By default a worker that has work is sent the next task already, where it waits although another has nothing to do."""
_PATIENCE = "20s"  # for a scheduler to answer, or to come back
_DEATHS = 2  # of local workers, before a task is tried alone, and again before it is given up


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[Cluster]:
    """The cluster that the settings ask for; workers that were started for it end with it."""
    with _cluster(settings) as cluster:
        try:
            yield cluster
        except KeyboardInterrupt:
            console.print("Stopping; the same command goes on from what is done")
            raise


@contextmanager
def _cluster(settings: ClusterSettings) -> Iterator[Cluster]:
    if settings.scheduler is None and settings.workers == 0:
        keep_memory()
        yield Here()
        return
    if settings.scheduler is None:
        method = start_forking(worker_environment(1))  # its imports go on beside those of this process
    from distributed import Client
    from distributed.utils import silence_logging_cmgr

    if settings.scheduler is not None:
        with silence_logging_cmgr("CRITICAL"), _client(settings.scheduler) as client:
            _meet_workers(client, settings.scheduler)
            yield DaskCluster(client, f"Dask at {settings.scheduler}, dashboard {client.dashboard_link}")
        return
    with _local_cluster(settings.workers, method) as local, Client(local) as client:
        yield DaskCluster(client, f"{len(local.workers)} local Dask worker(s)", own=True)


def _client(scheduler: str) -> Any:
    from distributed import Client

    try:
        return Client(scheduler, timeout=_PATIENCE)
    except (OSError, ValueError, TypeError) as error:  # the last for tls:// where Dask knows no certificate
        remedy = "Start one with `dask scheduler`, or leave `cluster.scheduler` out for workers on this machine."
        raise ClusterError(f"cluster.scheduler {scheduler}", f"no answer ({error})", "a Dask scheduler", remedy) from error


def _meet_workers(client: Any, scheduler: str) -> None:
    """Wait until there is a worker. Raises ClusterError where the scheduler is lost meanwhile, and CodeError where a worker
    has other code than this process, or none.

    What a worker has, it tells of the moment in which it was first asked, so that it has to be started again to have newer.
    Those that join later are asked with each task.
    """
    try:
        if not client.nthreads():
            console.print(f"Waiting for a worker of {scheduler}: `dask worker {scheduler} --nthreads 1` starts one")
        client.wait_for_workers(1)
        found = client.run(source_digest, on_error="return")  # an ImportError of those that have no Fullfield
    except OSError as error:
        raise lost(f"Dask at {scheduler}") from error
    answers = {worker: answer for worker, answer in found.items() if not isinstance(answer, OSError)}  # else it is gone
    if others := sorted(worker for worker, answer in answers.items() if answer != source_digest()):
        raise other_code(others)


@contextmanager
def _local_cluster(workers: int | None, method: str) -> Iterator[Any]:
    import dask
    from distributed import LocalCluster

    count = workers or 1
    gpus = cuda_devices() if count > 1 else []
    start = {
        "distributed.worker.multiprocessing-method": method,  # of the first; those that replace them start by themselves
        "distributed.nanny.environ": dict(os.environ),  # the fork server may be older than some of it
        "distributed.nanny.pre-spawn-environ": worker_environment(max(cores() // count, 1)),
    }
    with dask.config.set(_REPLACED):  # Dask asks for it whenever it loses one
        with dask.config.set({**start, **_UNWATCHED, **_UNHURRIED}), uninterrupted():
            # No limit of memory: tasks return numbers, so there is nothing to spill, and a worker that keeps its memory for
            # the next activation would be paused for ever.
            local = LocalCluster(
                n_workers=count,
                processes=True,
                worker_class=partial(_nanny, [UNBOUND | own_gpu(number, count, gpus) for number in range(count)]),
                threads_per_worker=1,
                memory_limit=0,
                security=True,  # keys of this command alone: Dask runs what it is sent, whoever has sent it
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={
                    "dashboard": False,  # to import what draws it takes longer than to import all of Dask
                    "allowed_failures": _DEATHS - 1,
                },
                silence_logs="CRITICAL",
            )
        try:
            yield local
        except KeyboardInterrupt:
            _kill_workers(local)  # which would else come to the end of a training step, or of a tile, first
            raise
        finally:
            with suppress(TimeoutError):  # on a busy machine: workers that are slow to end will end with this process
                local.close()


def _nanny(environments: Sequence[dict[str, str]], scheduler: str, *, name: int, **options: Any) -> Any:
    """What starts worker number `name`, in an environment that counts before what this process has, unlike those above."""
    from distributed import Nanny

    return Nanny(scheduler, name=name, env=environments[name], **options)


def own_gpu(worker: int, workers: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of one of so many workers, in which it computes on a GPU of its own, as far as there are enough.

    It finds them all, in an order in which its own is the first: a training on several `devices` takes those after it, too.
    """
    if workers < 2 or len(gpus) < 2:
        return {}
    first = worker * len(gpus) // workers
    return {"CUDA_VISIBLE_DEVICES": ",".join([*gpus[first:], *gpus[:first]])}


def _kill_workers(local: Any) -> None:
    for nanny in local.workers.values():
        nanny.auto_restart = False
        if nanny.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL)
