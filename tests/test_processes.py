"""Processes that run one task together: what they tell, how they end, and where they are."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.cluster import connect
from pipeline.errors import ClusterError, CodeError, SlideError, WorkerError
from pipeline.processes import together
from pipeline.settings import ClusterSettings

PLACE = ("WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "RANK")


def meet(folder: Path, processes: int) -> None:
    """Wait for the others, each of which leaves its place and its number."""
    (folder / os.environ["RANK"]).write_text(f"{os.getpid()} {[int(os.environ[name]) for name in PLACE]}")
    while len(list(folder.iterdir())) < processes:
        time.sleep(0.01)


def places(folder: Path) -> list[str]:
    return [path.read_text().partition(" ")[2] for path in sorted(folder.iterdir())]


def numbers(folder: Path, processes: int) -> Iterator[str]:
    meet(folder, processes)
    for number in range(3):
        yield f"{number} of {os.environ['RANK']}"


def failing(folder: Path) -> Iterator[int]:
    meet(folder, 2)
    yield 1
    if os.environ["RANK"] == "1":
        raise SlideError("a slide", "a hole", "pixels", "Scan it again.")
    time.sleep(600)


def waiting(folder: Path) -> Iterator[int]:
    meet(folder, 2)
    yield 1
    time.sleep(600)


def dying(folder: Path) -> Iterator[int]:
    meet(folder, 2)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    yield 1


def on_machines(folder: Path, nodes: int) -> Iterator[str]:
    """A task of a Dask worker."""
    yield from together(numbers, (folder, nodes), 1, nodes)


def one_of_machines(folder: Path) -> list[str]:
    return list(on_machines(folder, 2))


def have_newer_code() -> None:
    from pipeline import dask_cluster

    dask_cluster.source_digest = lambda: "another"


def assert_gone(folder: Path) -> None:
    for path in folder.iterdir():
        assert not psutil.pid_exists(int(path.read_text().split()[0]))


def test_what_the_first_yields_comes_back(tmp_path: Path) -> None:
    assert list(together(numbers, (tmp_path, 2), 2, 1)) == ["0 of 0", "1 of 0", "2 of 0"]
    assert places(tmp_path) == ["[2, 0, 0, 0]", "[2, 0, 1, 1]"]
    assert_gone(tmp_path)


def test_the_error_of_one_ends_all(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="a hole"):
        list(together(failing, (tmp_path,), 2, 1))
    assert_gone(tmp_path)


def test_the_death_of_one_ends_all(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="memory"):
        list(together(dying, (tmp_path,), 2, 1))
    assert_gone(tmp_path)


@pytest.mark.parametrize("size", [10, 10**6])
def test_one_that_ends_before_it_has_its_task_is_told_as_any(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(WorkerError, match="an end with code 1"):
        list(together(print, (bytes(size),), 2, 1))


def test_who_no_longer_listens_ends_all(tmp_path: Path) -> None:
    told = together(waiting, (tmp_path,), 2, 1)
    assert next(told) == 1
    told.close()
    assert_gone(tmp_path)


def test_machines_are_dask_workers(tmp_path: Path) -> None:
    """Two tasks that both want two machines, of which there are two, take turns."""
    for name in "ab":
        (tmp_path / name).mkdir()
    with connect(ClusterSettings(workers=2)) as cluster:
        told = [
            (outcome.key, outcome.value, outcome.error)
            for outcome in cluster.streams({name: (on_machines, (tmp_path / name, 2)) for name in "ab"})
        ]
        assert sorted(told) == [(name, f"{number} of 0", None) for name in "ab" for number in range(3)]
        for name in "ab":
            assert places(tmp_path / name) == ["[2, 0, 0, 0]", "[2, 1, 0, 1]"]
        with pytest.raises(ClusterError, match="2 worker"):
            list(cluster.stream(on_machines, tmp_path, 3))
        first, other = cluster._client.nthreads()
        cluster._client.run(have_newer_code, workers=[other])  # as one that has been started again has, after an update
        with pytest.raises(CodeError, match=f"workers {other}: found other code"):
            cluster._client.submit(one_of_machines, tmp_path, workers=[first]).result()


def test_machines_without_a_cluster_are_none(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="this process"):
        list(on_machines(tmp_path, 2))
