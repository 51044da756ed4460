import asyncio
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.cluster import connect, own_gpu
from pipeline.errors import ClusterError, CodeError, SlideError, WorkerError
from pipeline.machine import cores, user_name
from pipeline.settings import ClusterSettings
from pipeline.tasks import Outcome
from workflows.__main__ import main


def double(value: int) -> int:
    if value < 0:
        raise SlideError("slide.svs", f"{value}", "more than 0", "Take another.")
    return 2 * value


def count(stop: int) -> Iterator[int]:
    yield from range(stop)
    if stop == 3:
        raise SlideError("slide.svs", "3", "another number", "Take it.")


def count_for_ever() -> Iterator[int]:
    for number in itertools.count():
        time.sleep(0.01)
        yield number


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_mark_and_die(folder: Path) -> None:
    leave_a_mark(folder)
    die()


def take_a_while(began: Path, ended: Path) -> None:
    began.touch()
    time.sleep(2)
    ended.touch()


def environment() -> dict[str, str]:
    return {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_")}


def processors_under_openmp() -> set[int]:
    """Those that this thread may run on once torch's OpenMP is loaded, which may bind it to some."""
    for library in (Path(find_spec("torch").origin).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(library))
    return os.sched_getaffinity(0)


def arena_growth() -> int:
    """Bytes that the process still holds after 100 MB were freed: the allocator keeps them, or gives them back."""
    import psutil

    before = psutil.Process().memory_info().rss
    block = b"x" * 100_000_000
    del block
    return psutil.Process().memory_info().rss - before


def wake_ups_a_second() -> float:
    """How often Dask's own periodic work interrupts what a worker computes."""
    from distributed import get_worker

    return sum(1000 / callback.callback_time for callback in get_worker().periodic_callbacks.values())


def listening() -> set[str]:
    """Where this worker's cluster listens."""
    from distributed import get_worker

    worker = get_worker()
    return {worker.address, worker.nanny, worker.scheduler.address}


def leave_a_mark(folder: Path) -> None:
    (folder / str(os.getpid())).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


@pytest.fixture(scope="module", params=[0, 2], ids=["here", "workers"])
def cluster(request: pytest.FixtureRequest) -> Iterator[object]:
    with connect(ClusterSettings(workers=request.param)) as found:
        yield found


def test_every_task_has_its_outcome(cluster) -> None:
    for value in (3, -1, 5):
        cluster.submit(value, double, value)
    outcomes = {outcome.key: outcome for outcome in cluster}
    assert (outcomes[3].value, outcomes[5].value) == (6, 10)
    assert isinstance(outcomes[-1].error, SlideError)
    assert outcomes[-1].error.remedy == "Take another."


def test_every_worker_is_prepared_though_one_of_them_fails_and_another_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where there are several GPUs, each begins with another."""
    monkeypatch.setattr("pipeline.cluster.cuda_devices", lambda: ["3", "5"])
    with connect(ClusterSettings(workers=2)) as cluster:
        cluster.submit("busy", time.sleep, 0.5)
        cluster.prepare(leave_a_mark, tmp_path)
        cluster.prepare(double, -1)
        assert [outcome.key for outcome in cluster] == ["busy"]
        cluster.submit("after", double, 2)  # on a worker that had nothing else to do
        assert [outcome.value for outcome in cluster] == [4]
        until = time.monotonic() + 20
        while (found := sorted(path.read_text() for path in tmp_path.iterdir())) != ["3,5", "5,3"]:
            assert time.monotonic() < until, found
            time.sleep(0.05)


def test_more_may_be_submitted_meanwhile(cluster) -> None:
    cluster.submit(1, double, 1)
    found = []
    for outcome in cluster:
        found.append(outcome.value)
        if outcome.value < 16:
            cluster.submit(outcome.value, double, outcome.value)
    assert found == [2, 4, 8, 16]


def test_cancelled_tasks_have_no_outcome(cluster) -> None:
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("b", 4)):
        cluster.submit(key, double, value)
    cluster.cancel("a")
    assert sorted(outcome.value for outcome in cluster) == [4, 8]
    cluster.submit("a", double, 5)
    assert [outcome.value for outcome in cluster] == [10]


def test_a_stream_yields_in_order_and_raises(cluster) -> None:
    assert list(cluster.stream(count, 5)) == [0, 1, 2, 3, 4]
    received = []
    with pytest.raises(SlideError):
        received.extend(cluster.stream(count, 3))
    assert received == [0, 1, 2]


def test_workers_share_the_cores_and_keep_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in (("OMP_PROC_BIND", "true"), ("OMP_PLACES", "{0}"), ("GOMP_CPU_AFFINITY", "0")):
        monkeypatch.setenv(name, value)  # as some clusters do: all workers would be bound to one processor
    with connect(ClusterSettings(workers=1)) as cluster:
        cluster.submit("environment", environment)
        cluster.submit("memory", arena_growth)
        if sys.platform == "linux":
            cluster.submit("processors", processors_under_openmp)
        found = {outcome.key: outcome.value for outcome in cluster}
    assert found["environment"]["OMP_NUM_THREADS"] == str(cores())
    assert int(found["environment"]["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30
    if sys.platform == "linux":
        assert found["memory"] > 90_000_000
        assert found["processors"] == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("workers", "gpus", "first"),
    [(4, "0123", "0123"), (2, "0123", "02"), (3, "0123", "012"), (5, "01", "00011"), (1, "01", ""), (2, "0", "")],
)
def test_gpus_are_dealt_out_to_workers(workers: int, gpus: str, first: str) -> None:
    """Each finds all of them, for a training that takes several."""
    dealt = [own_gpu(number, workers, list(gpus)).get("CUDA_VISIBLE_DEVICES", "") for number in range(workers)]
    assert "".join(order[:1] for order in dealt) == first
    assert all(sorted(order.split(",")) == list(gpus) for order in dealt if order)


@pytest.mark.parametrize("cluster", [2], indirect=True, ids=["workers"])
def test_workers_of_this_machine_take_orders_from_nobody_else(cluster) -> None:
    from distributed import Security

    cluster.submit("listening", listening)
    (outcome,) = cluster
    assert len(outcome.value) == 3
    for address in outcome.value:
        for scheme, keys in (("tcp", Security()), ("tls", Security.temporary())):
            with pytest.raises(OSError):
                asyncio.run(ask(f"{scheme}://{address.rpartition('/')[2]}", keys))


async def ask(address: str, keys: object) -> None:
    from distributed import rpc

    async with rpc(address, connection_args=keys.get_connection_args("client"), timeout=0.3) as found:
        await found.identity()


def test_workers_are_left_to_their_work() -> None:
    with connect(ClusterSettings(workers=1)) as cluster:
        cluster.submit("wake-ups", wake_ups_a_second)
        (outcome,) = cluster
    assert 0 < outcome.value < 10


def test_a_task_that_kills_its_workers_fails_and_no_other_does(tmp_path: Path) -> None:
    """And it does so soon, before others end, and before most others of its key have killed workers as well."""
    with connect(ClusterSettings(workers=1)) as cluster:
        for _ in range(4):
            cluster.submit("deadly", leave_a_mark_and_die, tmp_path)
        for value in range(4):
            cluster.submit(value, double, value)
        outcomes = list[Outcome]()
        for outcome in cluster:
            outcomes.append(outcome)
            if outcome.error is not None:
                cluster.cancel(outcome.key)
                cluster.submit("environment", environment)
        keys, found = [outcome.key for outcome in outcomes], {outcome.key: outcome for outcome in outcomes}
        assert keys.index("deadly") < 4 and len(keys) == len(found)
        assert len(list(tmp_path.iterdir())) <= 4 + 2  # deaths, until one is suspected, and alone
        assert [found[value].value for value in range(4)] == [0, 2, 4, 6]
        assert isinstance(found["deadly"].error, WorkerError)
        assert "cluster.workers" in str(found["deadly"].error)
        environment_later = found["environment"].value  # of the worker that came last
        assert int(environment_later["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30


def test_an_address_is_used_and_its_workers_are_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep their memory, and know who they work for."""
    from distributed import LocalCluster

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as local,
        connect(ClusterSettings(scheduler=local.scheduler_address)) as cluster,
    ):
        cluster.submit("memory", arena_growth)
        cluster.submit("user", os.getenv, "LOGNAME")
        found = {outcome.key: outcome.value for outcome in cluster}
    assert found["user"] == user_name()
    assert sys.platform != "linux" or found["memory"] > 90_000_000


def have_other_code() -> None:
    from pipeline import origin

    origin.source_digest = lambda: "another"


def have_no_code() -> None:
    sys.modules["pipeline.origin"] = None  # type: ignore[assignment]  # importing it fails


@pytest.mark.parametrize("make_other", [have_other_code, have_no_code])
def test_workers_with_other_code_are_refused(make_other: Callable[[], None]) -> None:
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as local:
        with Client(local) as client:
            client.run(make_other)
        with pytest.raises(ClusterError, match=r"workers tcp://127\.0\.0\.1:\d+: found other code"):
            connect(ClusterSettings(scheduler=local.scheduler_address)).__enter__()


def test_a_worker_that_joins_late_with_other_code_ends_the_command() -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as local,
        connect(ClusterSettings(scheduler=local.scheduler_address)) as cluster,
        Client(local) as client,
    ):
        before = set(client.nthreads())
        local.scale(2)
        client.wait_for_workers(2)
        client.run(have_newer_code, workers=list(set(client.nthreads()) - before))
        for value in range(20):
            cluster.submit(value, nap, value)
        with pytest.raises(CodeError, match="found other code"):
            list(cluster)
        with pytest.raises(CodeError, match="found other code"):
            list(cluster.streams(dict.fromkeys(range(2), (count_slowly, ()))))


def test_a_command_whose_own_workers_do_not_come_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_LOOK_SECONDS", 0.1), ("_LONELY_SECONDS", 0.3), ("_OVER_SECONDS", 0.6)):
        monkeypatch.setattr(f"pipeline.dask_cluster.{name}", seconds)
    with connect(ClusterSettings(workers=1)) as cluster:
        cluster._client.cluster.scale(0)
        while cluster.workers():
            time.sleep(0.05)
        cluster.submit("a", nap, 3)
        with pytest.raises(ClusterError, match="no worker that could be started again.*same command again"):
            list(cluster)


def test_who_is_left_without_workers_says_so_and_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr("pipeline.dask_cluster._LOOK_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.dask_cluster._LONELY_SECONDS", 0.5)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as local,
        connect(ClusterSettings(scheduler=local.scheduler_address)) as cluster,
    ):
        local.scale(0)
        later = threading.Timer(4, local.scale, [1])
        later.start()
        time.sleep(1)  # until it is gone
        cluster.submit("a", nap, 3)
        assert [outcome.value for outcome in cluster] == [3]
        later.join()
    assert capsys.readouterr().out.count("No worker is left") == 1


def have_newer_code() -> None:
    from pipeline import dask_cluster

    dask_cluster.source_digest = lambda: "another"


def nap(value: int) -> int:
    time.sleep(0.2)
    return value


def count_slowly() -> Iterator[int]:
    yield nap(1)


def test_a_scheduler_that_is_lost_before_it_has_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr("pipeline.cluster._PATIENCE", "3s")
    local = LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None)
    end = threading.Timer(2, local.close)
    end.start()
    with pytest.raises(ClusterError, match="no longer answers"):
        connect(ClusterSettings(scheduler=local.scheduler_address)).__enter__()
    end.join()


def test_who_waits_for_workers_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as local:
        later = threading.Timer(2, local.scale, [1])
        later.start()
        with connect(ClusterSettings(scheduler=local.scheduler_address)) as cluster:
            cluster.submit("a", double, 21)
            assert [outcome.value for outcome in cluster] == [42]
        later.join()
    address = local.scheduler_address
    told = f"Waiting for a worker of {address}: `dask worker {address} --nthreads 1` starts one"
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_stream_ends_with_its_client() -> None:
    """The only thread of the only worker is free for the next client."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as local:
        settings = ClusterSettings(scheduler=local.scheduler_address)
        with connect(settings) as cluster:
            assert next(cluster.stream(count_for_ever)) == 0
        with connect(settings) as cluster:
            cluster.submit("a", double, 21)
            assert [outcome.value for outcome in cluster] == [42]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_this_process_keeps_its_memory_when_it_does_the_work() -> None:
    imports = "from pipeline.machine import keep_memory; from tests.test_cluster import arena_growth"
    code = f"{imports}; keep_memory(); print(arena_growth())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 90_000_000


def fail_after(stop: int) -> Iterator[int]:
    yield from range(stop)
    raise SlideError("slide.svs", f"{stop}", "another number", "Take it.")


def die_after_one() -> Iterator[int]:
    yield 0
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_stream_that_kills_its_workers_fails_and_no_other_does() -> None:
    """Though they come back later than Dask, asked for no more patience, would wait for them."""
    import dask

    tasks = {"deadly": (die_after_one, ()), **{number: (count, (number,)) for number in (4, 5)}}
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "100ms"}),
        connect(ClusterSettings(workers=1)) as cluster,
    ):
        told = list(cluster.streams(tasks))
    errors = {each.key: each.error for each in told if each.error is not None}
    assert list(errors) == ["deadly"] and isinstance(errors["deadly"], WorkerError)
    assert "lower training.batch_size" in str(errors["deadly"])
    for number in (4, 5):
        assert {each.value for each in told if each.key == number} == set(range(number))


def test_streams_side_by_side_tell_all_in_order_and_one_that_fails_stops_no_other(cluster) -> None:
    tasks = {"long": (count, (200,)), "none": (count, (0,)), "bad": (fail_after, (2,)), "short": (count, (5,))}
    told = list(cluster.streams(tasks))
    values = {key: [each.value for each in told if each.key == key and each.error is None] for key in tasks}
    assert values == {"long": list(range(200)), "none": [], "bad": [0, 1], "short": list(range(5))}
    assert [(each.key, type(each.error)) for each in told if each.error is not None] == [("bad", SlideError)]


def test_an_interrupted_command_says_so_and_does_not_wait_for_what_its_workers_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began, ended = tmp_path / "began", tmp_path / "ended"
    with pytest.raises(KeyboardInterrupt), connect(ClusterSettings(workers=0)):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "Stopping; the same command goes on from what is done\n"
    with pytest.raises(KeyboardInterrupt), connect(ClusterSettings(workers=1)) as cluster:
        cluster.submit("long", take_a_while, began, ended)
        while not began.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt
    time.sleep(2.5)
    assert not ended.exists()


def test_a_command_that_is_told_to_end_stops_as_by_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def time_is_up(*arguments: object) -> None:
        with connect(ClusterSettings(workers=0)):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("workflows.inspect.inspect", time_is_up)
    monkeypatch.setattr("sys.argv", ["fullfield", "inspect", "a.tiff"])
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that pytest outlives a command that does not heed it
    try:
        with pytest.raises(SystemExit) as ended:
            main()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert capsys.readouterr().out == "Stopping; the same command goes on from what is done\n"
