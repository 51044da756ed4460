"""Processes of a segmentation are killed at moments drawn at random; what is there in the end is as if none had been.

FULLFIELD_KILLS=10 kills each kind of process at ten moments instead of one.
"""

import csv
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import torch

from pipeline.architectures import build_network
from pipeline.canvas import open_canvas
from pipeline.checkpoint import save
from pipeline.classes import Class, Classes
from pipeline.footprint import with_footprint
from pipeline.network import ModelSpec
from pipeline.phantom import render, write_slide
from pipeline.runtime import EXACT
from pipeline.settings import ClusterSettings
from workflows.segment import segment

ROOT = Path(__file__).parents[1]
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
TILE, TILES = 96, 8 * 6  # pixels; those of the slide, nearly all of which hold tissue
MOMENTS = range(int(os.environ.get("FULLFIELD_KILLS", "1")))
PATIENCE = 120  # seconds until something is taken to hang

Picture = dict[str, np.ndarray | str]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide and a small model with random weights."""
    folder = tmp_path_factory.mktemp("kill")
    write_slide(render(3, 701, 503, 1.0, spread=3)[0], folder / "slide.tiff", 1.0)
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2)
    torch.manual_seed(3)
    network = build_network(spec).eval()
    save(folder / "model", with_footprint(spec, network), network)
    return folder


@pytest.fixture(scope="module")
def undisturbed(project: Path) -> Picture:
    assert run_here(project, project / "undisturbed") == 0
    return picture(project / "undisturbed")


def run_here(project: Path, output: Path, workers: int = 0) -> int:
    where = ClusterSettings(workers=workers)
    return segment([project / "slide.tiff"], [str(project / "model")], output, None, TILE, where, EXACT)


def command(project: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    arguments = ("segment", project / "slide.tiff", "--model", project / "model", "--output", output, "--tile-size", TILE)
    return started("workflows", *arguments, *more)


def started(module: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def picture(output: Path) -> Picture:
    """All that a segmentation leaves for people: labels, probabilities, OME-TIFF and outlines."""
    folder = output / "slides" / "slide"
    canvas = open_canvas(folder / "segmentation.ome.zarr")
    assert not list(output.rglob("*.partial"))
    with (output / "slides.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done"]
    return {
        "labels": canvas.read_labels(canvas.lattice.roi),
        "coarse": canvas.read_labels(canvas.levels[-1].roi, len(canvas.levels) - 1),
        "probabilities": canvas.read_probabilities(canvas.lattice.roi),
        "tiff": tifffile.imread(folder / "segmentation.ome.tif"),
        "regions": (folder / "regions.geojson").read_text(),
    }


def same(one: Picture, other: Picture) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in {*one, *other})


def await_moment(output: Path, seed: int, over: Callable[[], bool]) -> None:
    """Wait until so many tiles are written, any number of them, and a little longer."""
    draw, shards = (
        random.Random(seed),
        output / "slides" / "slide" / "segmentation.ome.zarr" / "labels" / "classes" / "0" / "c",
    )
    tiles, delay, deadline = draw.randint(1, TILES), draw.uniform(0, 0.3), time.monotonic() + PATIENCE
    while len(list(shards.glob("*/*"))) < tiles and time.monotonic() < deadline and not over():
        time.sleep(0.005)
    assert len(list(shards.glob("*/*"))) >= tiles
    time.sleep(delay)


def strike(folder: Path, seed: int, attempt: Callable[[Path, int], bool]) -> None:
    """Kill at a moment; where that came after the end of a run and proves nothing, at another, in another folder."""
    for moment in range(seed, seed + 50_000, 10_000):
        output = folder / str(moment)
        output.mkdir()
        if attempt(output, moment):
            return
    pytest.fail("every kill came too late")


def under_way(project: Path, output: Path, moment: int, *more: object) -> subprocess.Popen[str]:
    """A command that has come to a moment."""
    client = command(project, output, *more)
    await_moment(output, moment, lambda: client.poll() is not None)
    return client


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Workers that were forked, and those that replaced them, which start by themselves."""
    forked = [child for server in fork_servers_of(process) for child in server.children()]
    return forked + [child for child in process.children() if runs(child, "spawn_main")]


def fork_servers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if runs(child, "forkserver")]


def runs(process: psutil.Process, function: str) -> bool:
    with suppress(psutil.NoSuchProcess):  # it may have ended since it was listed
        return any(function in word for word in process.cmdline())
    return False


def kill_a_worker(output: Path, seed: int, over: Callable[[], bool]) -> bool:
    """Kill a worker of this process at a moment drawn at random; returns whether another one took its place."""
    here, workers = psutil.Process(), list[psutil.Process]()
    with suppress(psutil.NoSuchProcess):  # it came too late
        while not workers and not over():
            time.sleep(0.01)
            workers = workers_of(here)
        await_moment(output, seed, over)
        workers[0].kill()
        workers[0].wait(PATIENCE)
        while not over():
            if any(other.pid != workers[0].pid for other in workers_of(here)):
                return True
            time.sleep(0.01)
    return False


@contextmanager
def a_scheduler(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Dask scheduler with a worker, each in a process of its own, as on a cluster."""
    found = ("--scheduler-file", folder / "scheduler.json", "--no-dashboard")
    scheduler = started("distributed.cli.dask_scheduler", *found, "--host", "127.0.0.1", "--port", 0)
    worker = started("distributed.cli.dask_worker", *found, "--nthreads", 1, "--memory-limit", 0)
    try:
        while not found[1].exists() and scheduler.poll() is None:
            time.sleep(0.05)
        yield scheduler, json.loads(found[1].read_text())["address"]
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.communicate(timeout=PATIENCE)


def test_two_workers_give_what_one_process_gives(project: Path, undisturbed: Picture, tmp_path: Path) -> None:
    assert run_here(project, tmp_path, workers=2) == 0
    assert same(picture(tmp_path), undisturbed)


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_killed_worker_is_replaced(project: Path, undisturbed: Picture, tmp_path: Path, seed: int) -> None:
    def attempt(output: Path, moment: int) -> bool:
        ended = threading.Event()
        with ThreadPoolExecutor() as killer:
            replaced = killer.submit(kill_a_worker, output, moment, ended.is_set)
            try:
                assert run_here(project, output, workers=1) == 0
            finally:
                ended.set()
        assert same(picture(output), undisturbed)
        return replaced.result()

    strike(tmp_path, seed, attempt)


@pytest.mark.skipif(sys.platform != "linux", reason="only there workers are forked")
@pytest.mark.parametrize("seed", MOMENTS)
def test_a_killed_fork_server_is_done_without(project: Path, undisturbed: Picture, tmp_path: Path, seed: int) -> None:
    def attempt(output: Path, moment: int) -> bool:
        client, servers = under_way(project, output, moment, "--workers", 1), list[psutil.Process]()
        with suppress(psutil.NoSuchProcess):  # it came too late
            servers = fork_servers_of(psutil.Process(client.pid))
            for server in servers:
                server.kill()
        log, _ = client.communicate(timeout=PATIENCE)
        assert client.returncode == 0, log
        assert same(picture(output), undisturbed)
        return bool(servers)

    strike(tmp_path, 300 + seed, attempt)


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_killed_command_takes_its_workers_along(project: Path, undisturbed: Picture, tmp_path: Path, seed: int) -> None:
    def attempt(output: Path, moment: int) -> bool:
        client, workers = under_way(project, output, moment, "--workers", 1), list[psutil.Process]()
        with suppress(psutil.NoSuchProcess):  # it came too late
            workers = workers_of(psutil.Process(client.pid))
        client.kill()
        client.communicate()
        assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
        assert run_here(project, output) == 0
        assert same(picture(output), undisturbed)
        return bool(workers and client.returncode)

    strike(tmp_path, 100 + seed, attempt)


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_killed_scheduler_is_told_at_once(project: Path, undisturbed: Picture, tmp_path: Path, seed: int) -> None:
    def attempt(output: Path, moment: int) -> bool:
        with a_scheduler(output) as (scheduler, address):
            client = under_way(project, output, moment, "--scheduler", address)
            scheduler.kill()
            log, _ = client.communicate(timeout=PATIENCE)
        late = "1 slides done" in log
        assert client.returncode == (0 if late else 1)
        assert late or "ClusterError" in log
        assert "Traceback" not in log
        assert run_here(project, output) == 0
        assert same(picture(output), undisturbed)
        return not late

    strike(tmp_path, 200 + seed, attempt)
