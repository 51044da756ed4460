"""The tile size: what is measured is what a process really holds, and what is chosen reads least of all that fits."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from pipeline import tiling
from pipeline.architectures import build_network
from pipeline.canvas import create_canvas
from pipeline.checkpoint import save
from pipeline.classes import Class, Classes
from pipeline.cluster import connect
from pipeline.engine import TorchEngine
from pipeline.errors import CanvasError, ClusterError, WorkerError
from pipeline.footprint import with_footprint
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.grid import Grid
from pipeline.machine import worker_environment
from pipeline.network import ModelSpec
from pipeline.phantom import render, write_slide
from pipeline.probe import Probe, kept_probe, probe
from pipeline.segmentation import with_tile_sizes
from pipeline.settings import ClusterSettings, EngineSettings, SegmentationSettings, TissueSettings
from pipeline.slide import open_slide
from pipeline.slide_job import SlideJob, is_finished, job_tile_size
from pipeline.slide_tasks import plan_slide
from pipeline.stitching import stitching
from pipeline.tasks import Outcome
from pipeline.tiling import GIB, choose, estimate, local_workers, tile_size_for
from pipeline.tissue import Tissue

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))
MODEST = Probe(0.5 * GIB, 400.0, 5e6, 0.5)


def spec(halo: int = 32, stride: int = 8, output_stride: int = 1) -> ModelSpec:
    fields = {"architecture": "fcn", "classes": CLASSES, "mpp": 1.0, "patch_size": 64, "width": 4, "depth": 2}
    return ModelSpec(**fields, halo=halo, stride=stride, output_stride=output_stride)


def lattice(width: int, height: int) -> Lattice:
    return Lattice(width, height, Mpp.square(1.0))


def full(slide: Lattice) -> tuple[Lattice, Tissue]:
    """A slide that is all tissue."""
    coarse = slide.at(Mpp.square(64.0))
    return slide, Tissue(np.ones(coarse.shape, bool), coarse)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that earlier runs found on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    network = build_network(spec()).eval()
    folder = tmp_path_factory.mktemp("model") / "model"
    save(folder, with_footprint(spec(), network), network)
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "slide.tiff"
    write_slide(render(4, 1301, 907, 1.0, spread=3)[0], path, 1.0)
    return path


def window(slide: Lattice, tile: int, halo: int) -> int:
    """Pixels of what is read for a tile."""
    return math.prod(Grid(slide, tile, halo, 8).read_shape)


@pytest.mark.parametrize(
    "size", [(50_003, 30_001), (8192, 8191), (6001, 5003), (4501, 907), (1483, 1110), (300, 200), (1, 40)]
)
@pytest.mark.parametrize("halo", [0, 32, 96, 320])
@pytest.mark.parametrize("memory_gib", [0.9, 2.0, 30.0])
def test_no_other_size_that_fits_reads_less(size: tuple[int, int], halo: int, memory_gib: float) -> None:
    slide = lattice(*size)
    chosen = choose(spec(halo), [full(slide)], MODEST, memory_gib)
    assert chosen % 256 == 0 and chosen < max(size) + 256

    def read(tile: int) -> int:
        return len(Grid(slide, tile, halo, 8)) * window(slide, tile, halo)

    assert MODEST.peak_bytes(window(slide, chosen, halo)) <= memory_gib * GIB
    for other in range(256, max(size) + 256, 256):
        if max(size) <= 64 * other and MODEST.peak_bytes(window(slide, other, halo)) <= memory_gib * GIB:
            if window(slide, other, halo) <= window(slide, chosen, halo):
                assert read(chosen) <= read(other)
            elif halo and other <= 4096:  # what larger ones spare is not worth their memory
                assert read(chosen) < 1.05 * read(other)


@pytest.mark.parametrize(("size", "halo"), [((1483, 1110), 544), ((600, 501), 544), ((4501, 3000), 320)])
def test_a_slide_for_all_of_which_there_is_memory_is_read_at_once(size: tuple[int, int], halo: int) -> None:
    slide = lattice(*size)
    enough = MODEST.peak_bytes(window(slide, max(size), halo)) / GIB
    assert len(Grid(slide, choose(spec(halo), [full(slide)], MODEST, enough), halo, 8)) == 1


@pytest.mark.parametrize(("slide", "times"), [(lattice(1483, 1110), 2), (lattice(1483, 1483), 1)])
def test_a_window_that_is_not_square_is_held_twice_where_it_is_turned(slide: Lattice, times: int) -> None:
    turned, area = replace(MODEST, turned=True), times * window(slide, 1536, 32)
    few = choose(spec(), [full(slide)], turned, MODEST.peak_bytes(area - 1) / GIB)
    assert choose(spec(), [full(slide)], turned, MODEST.peak_bytes(area) / GIB) == 1536 > few
    for way in (stitching(spec(), blended=False), stitching(spec(), blended=True)):
        peaks = [estimate(way, *full(slide), found, 1536, 1).peak_bytes for found in (MODEST, turned)]
        pixels = way.computed(way.grid(slide, 1536)) * (times if way.exact else 1)
        assert peaks == [round(MODEST.peak_bytes(way.computed(way.grid(slide, 1536)))), round(MODEST.peak_bytes(pixels))]


def test_the_largest_window_of_all_slides_has_to_fit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of one in which no tissue is looked for, as others are longer."""
    shapes = [(100, 700), (700, 100), (100, 690), (680, 100), (100, 670), (500, 500)]
    for number, shape in enumerate(shapes):
        write_slide(np.full((*shape, 3), 120, np.uint8), tmp_path / f"{number}.tiff", 1.0)
    slides = [(path, None) for path in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(tiling, "known_probe", lambda *_: MODEST)
    limit = MODEST.peak_bytes(400 * 400) / GIB
    assert tile_size_for(slides[:-1], model, limit, TissueSettings()) == 768
    assert tile_size_for(slides, model, limit, TissueSettings()) == 256


@pytest.mark.parametrize("halo", [0, 32, 96])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_size_reads_less_of_tissue_among_glass(halo: int, seed: int) -> None:
    model, slide = spec(halo), lattice(30_001, 20_003)
    coarse = slide.at(Mpp.square(64.0))
    mask = gaussian_filter(np.random.default_rng(seed).random(coarse.shape), 12) > 0.505
    tissue = Tissue(mask, coarse)

    def read(tile: int) -> int:
        grid = Grid(slide, tile, halo, model.stride)
        return sum(cell.read_roi.area for cell in grid if tissue.fraction(cell.write_roi, slide) > 0)

    chosen = choose(model, [(slide, tissue)], MODEST, 3.0)
    others = [size for size in range(512, 2049, 256) if MODEST.peak_bytes((size + 2 * halo) ** 2) <= 3.0 * GIB]
    assert read(chosen) == min(read(size) for size in others)
    assert choose(model, [full(slide)], MODEST, 3.0) >= chosen


@pytest.mark.parametrize(("radius", "dear"), [(3.5, True), (4.5, False), (20.0, False)])
def test_a_dear_halo_is_paid_only_where_it_spares_a_tenth(radius: float, dear: bool) -> None:
    rows, columns = np.ogrid[:48, :48]
    cells = np.hypot(rows - 23, columns - 23) < radius
    slide = lattice(49_152, 49_152)
    tissue = Tissue(np.kron(cells, np.ones((8, 8), bool)), slide.at(Mpp.square(128.0)))
    way = stitching(spec(96), blended=False)

    def read(tile: int) -> int:
        grid = way.grid(slide, tile)
        return sum(cell.read_roi.area for cell in grid if tissue.fraction(cell.write_roi, slide) > 0)

    chosen = choose(spec(96), [(slide, tissue)], MODEST, 3.0)
    sizes = [size for size in range(768, 4097, 256) if MODEST.peak_bytes((size + 192) ** 2) <= 3.0 * GIB]
    cheap = min(read(size) for size in sizes if way.cost(size) <= 1.2)
    assert (cheap > 1.1 * min(read(size) for size in sizes)) == (way.cost(chosen) > 1.2) == dear
    assert read(chosen) == (min(read(size) for size in sizes) if dear else cheap)


def test_a_slide_of_glass_has_a_tile_size() -> None:
    slide = lattice(30_001, 20_003)
    glass = Tissue(np.zeros((20, 30), bool), slide.at(Mpp.square(1000.0)))
    assert choose(spec(), [(slide, glass)], MODEST, 3.0) == choose(spec(), [full(slide)], MODEST, 3.0)


def test_large_tiles_are_worth_their_memory_only_where_the_halo_is_dear() -> None:
    vast = lattice(100_003, 80_001)
    plenty = replace(MODEST, bytes_per_pixel=1.0)
    assert 3072 <= choose(spec(96), [full(vast)], plenty, 30.0) <= 4096
    least = choose(spec(8), [full(vast)], plenty, 30.0)
    assert least < 4096
    way = stitching(spec(8), blended=False)
    assert way.cost(2 * least) > 0.98 * way.cost(least)


def test_a_slide_is_hundreds_of_files_also_without_a_halo() -> None:
    vast = lattice(131_072, 100_001)
    assert len(Grid(vast, choose(spec(0), [full(vast)], MODEST, 30.0), 0, 8)) <= 64**2


def test_more_memory_is_taken_where_the_halo_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(gib: int) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Free", (), {"available": gib * GIB})())

    vast = lattice(100_003, 80_001)
    monkeypatch.setattr(tiling, "threads", tiling.cores)
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 64 * GIB)
    free(64)
    usual, dear = choose(spec(32), [full(vast)], MODEST, None), choose(spec(96), [full(vast)], MODEST, None)
    assert MODEST.peak_bytes((usual + 64) ** 2) <= 2 * GIB
    assert 2 * GIB < MODEST.peak_bytes((dear + 192) ** 2) <= 3 * GIB
    free(1)
    assert MODEST.peak_bytes((choose(spec(96), [full(vast)], MODEST, None) + 192) ** 2) <= GIB


def test_tiles_fit_the_gpu_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside which the process holds more than a worker on a processor may take: CUDA's own pages."""
    monkeypatch.setattr(tiling, "free_gib", lambda: 24.0)
    monkeypatch.setattr(tiling, "threads", tiling.cores)
    vast = [full(lattice(40_003, 30_001))]
    beside = replace(MODEST, base_bytes=3.5 * GIB, bytes_per_pixel=30.0)
    for free_gib, largest in ((8.0, 2304), (24.0, 4096)):
        card = replace(beside, gpu_base_bytes=0.4 * GIB, gpu_bytes_per_pixel=1000.0, gpu_free_bytes=free_gib * GIB)
        for memory_gib in (None, 24.0):
            chosen = choose(spec(96), vast, card, memory_gib)
            assert card.gpu_peak_bytes((chosen + 192) ** 2) <= 0.8 * free_gib * GIB
            assert largest // 2 < chosen <= largest
    with pytest.raises(ClusterError, match=r"the GPU: found 0.50 GiB.*expected 0.7. GiB, for tiles of 256 px"):
        choose(spec(96), vast, replace(card, gpu_free_bytes=0.5 * GIB), None)


def test_workers_share_the_memory_as_they_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "free_gib", lambda: 2.0)
    monkeypatch.setattr(tiling, "cores", lambda: 4)
    vast, sizes = lattice(100_003, 80_001), []
    for threads in (2, 4):
        monkeypatch.setattr(tiling, "threads", lambda own=threads: own)
        sizes.append(choose(spec(32), [full(vast)], MODEST, None))
        assert MODEST.peak_bytes((sizes[-1] + 64) ** 2) <= 2 * GIB * threads / 4
    assert sizes[0] < sizes[1]


def test_there_are_workers_for_whom_there_is_work_and_memory(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, area = Mpp.square(1.0), open_slide(scan).base.at(Mpp.square(1.0)).roi.area

    def slides(pixels: float) -> list[tuple[Path, float | None]]:
        """A damaged one, and as many as have so many pixels."""
        return [(scan.with_name("none.tiff"), None), *[(scan, None)] * math.ceil(pixels / area)]

    machine = {"cores": 16, "has_gpu": False, "free_gib": 9.0}
    for name, value in machine.items():
        monkeypatch.setattr(tiling, name, lambda own=value: own)
    assert [local_workers(slides(mpx * 1e6), fine) for mpx in (1, 15, 29, 30, 46, 60, 900)] == [1, 1, 1, 2, 3, 4, 4]
    assert local_workers(slides(60e6), Mpp.square(4.0)) == 1
    for name, value, count in (
        ("free_gib", 7.0, 3),
        ("free_gib", 1.0, 1),
        ("has_gpu", True, 1),
        ("cores", 1, 1),
        ("cores", 2, 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tiling, name, lambda own=value: own)
            assert local_workers(slides(60e6), fine) == count


def test_too_little_memory_is_an_error_that_says_how_much_it_takes() -> None:
    with pytest.raises(ClusterError, match="found 0.10 GiB") as caught:
        choose(spec(64), [full(lattice(5000, 4000))], MODEST, 0.1)
    needed = float(caught.value.expected.split(" GiB")[0])
    assert needed == pytest.approx(MODEST.peak_bytes((256 + 128) ** 2) / GIB, abs=0.02)


@pytest.mark.parametrize(("stride", "output_stride"), [(8, 1), (32, 32), (24, 8)])
def test_the_size_suits_the_stride(stride: int, output_stride: int) -> None:
    model = spec(2 * stride, stride, output_stride)
    chosen = choose(model, [full(lattice(9001, 7003))], MODEST, None)
    assert chosen % stride == chosen % 256 == 0


def test_an_estimate_counts_the_tiles_that_are_run() -> None:
    slide, mask = lattice(1000, 700), np.zeros((7, 10), bool)
    mask[0:3, 0:6] = True
    tissue = Tissue(mask, Lattice(10, 7, Mpp.square(100.0)))
    found = estimate(stitching(spec(), blended=False), slide, tissue, MODEST, 256, workers=2)
    assert (found.tile_size, found.tiles, found.tissue_tiles) == (256, 12, 6)
    assert found.pixels == 3 * 256 * 256 + 3 * 256 * 256
    assert found.halo_cost == pytest.approx(1.5625)
    assert found.seconds == pytest.approx(6 * 320**2 / 5e6 / 2)
    assert found.peak_bytes == round(MODEST.peak_bytes(320**2))
    assert found.output_bytes == 6 * 256 * 256 // 2 * 4 // 3  # half a byte a pixel, and a third more for the pyramid


class Held:
    """An engine that holds a known amount of memory for each pixel."""

    def __init__(self, bytes_per_pixel: int) -> None:
        self.spec, self.bytes_per_pixel, self.windows = spec(), bytes_per_pixel, []

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        self.windows.append(windows.shape)
        held = np.ones(windows[..., 0].size * self.bytes_per_pixel, np.uint8)
        return np.full((1, 2, *windows.shape[1:3]), held[0] / 2, np.float32)


class Card:
    """A GPU as torch.cuda tells of it, for an engine that takes 1000 bytes a pixel there beside 3 MB of weights."""

    def __init__(self) -> None:
        self.reserved = self.peak = 3_000_000
        self.others = 0

    def run(self, windows: np.ndarray) -> None:
        self.reserved = max(self.reserved, 3_000_000 + 1000 * windows[..., 0].size)  # and kept for the next window
        self.peak = max(self.peak, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = 3_000_000

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.reserved

    def max_memory_reserved(self) -> int:
        return self.peak

    def memory_reserved(self) -> int:
        return self.reserved

    def mem_get_info(self) -> tuple[int, int]:
        return 8 * GIB - self.others - self.reserved, 10 * GIB


class OnCard(Held):
    """An engine that holds memory of a GPU, too."""

    def __init__(self, card: Card) -> None:
        super().__init__(1)
        self.card = card

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        self.card.run(windows)
        return super().__call__(windows)


def test_the_memory_of_a_gpu_is_measured_by_itself(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, slide = Card(), open_slide(scan)
    engine = OnCard(card)
    way, place = stitching(engine.spec, blended=False), Roi(600, 400, 1, 1)
    found = probe(slide, slide.base, engine, place, way)
    assert (found.gpu_base_bytes, found.gpu_bytes_per_pixel, found.gpu_free_bytes) == (0, 0, 0)
    monkeypatch.setattr("pipeline.probe.cuda", lambda: card)
    card.run(np.zeros((1, 3000, 3000, 3), np.uint8))  # of which nothing is left
    found = probe(slide, slide.base, engine, place, way)
    assert (found.gpu_base_bytes, found.gpu_bytes_per_pixel, found.gpu_free_bytes) == (3_000_000, 1000, 8 * GIB)


def test_a_gpu_that_was_busy_once_is_not_taken_to_be_busy_for_ever(
    scan: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card, on_gpu = Card(), EngineSettings(backend="torch")
    engine = OnCard(card)
    monkeypatch.setattr("pipeline.probe.cuda", lambda: card)
    monkeypatch.setattr("pipeline.probe.open_engine", lambda *_: engine)
    monkeypatch.setattr("pipeline.probe.has_gpu", lambda: True)
    monkeypatch.setattr("pipeline.engine.device_name", lambda: "A100")

    def size(taken: float) -> int:
        card.others = round(taken * GIB)
        return tile_size_for([(scan, None)], model, 3.0, TissueSettings(), on_gpu)

    with pytest.raises(ClusterError, match=r"the GPU: found 0\.0. GiB"):
        size(7.97)
    tried = len(engine.windows)
    assert size(0.0) > size(7.5)
    with pytest.raises(ClusterError, match=r"the GPU: found 0\.0. GiB"):
        size(7.97)
    assert len(engine.windows) == tried > 0  # only what is free is asked anew


PROBED = """
from pathlib import Path
from pipeline.geometry import Roi
from pipeline.slide import open_slide
from pipeline.stitching import stitching
from pipeline.probe import probe
from tests.test_tiling import Held

slide, engine = open_slide(Path({path!r})), Held(400)
way = stitching(engine.spec, blended=False)
first, second = (probe(slide, slide.base, engine, Roi(600, 400, 1, 1), way) for _ in range(2))
print(first.bytes_per_pixel, second.bytes_per_pixel, first.base_bytes, second.base_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_the_memory_measured_is_that_which_is_held_also_where_a_process_has_kept_some(scan: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBED.format(path=str(scan))], capture_output=True, text=True, check=True)
    first, second, base, base_later = map(float, done.stdout.split())
    # Beside the engine's 400 there are windows, answers and what is written of them: some tens of bytes a pixel.
    assert 390 < first < 500
    assert 390 < second < 500
    assert 2e7 < base < GIB
    assert abs(base_later - base) < 1e8


def test_windows_of_two_sizes_are_run_however_small_the_slide(scan: Path) -> None:
    engine, slide = Held(1), open_slide(scan)
    way = stitching(engine.spec, blended=False)
    for base, place in ((slide.base, Roi(1290, 900, 8, 5)), (lattice(40, 1), Roi(0, 0, 40, 1))):
        found = probe(slide, base, engine, place, way)
        assert found.pixels_per_second > 0
        assert found.output_bytes > 0
    assert {shape[1:3] for shape in engine.windows} == {(320, 320), (832, 832)}


def test_glass_round_a_small_slide_is_not_taken_for_what_its_pixels_cost_on_disk(tmp_path: Path) -> None:
    """Of noise a byte and more is written for each pixel, of glass next to nothing."""

    class Noise(Held):
        def __call__(self, windows: np.ndarray) -> np.ndarray:
            noise = np.random.default_rng(0).random((1, 2, *windows.shape[1:3]), np.float32)
            return np.where((windows == 255).all(axis=-1), np.float32(1), noise)

    def probed(width: int) -> Probe:
        write_slide(np.full((1000, width, 3), 120, np.uint8), tmp_path / f"{width}.tiff", 1.0)
        engine, slide = Noise(1), open_slide(tmp_path / f"{width}.tiff")
        return probe(slide, slide.base, engine, Roi(width // 2, 500, 1, 1), stitching(engine.spec, blended=False))

    small, large = probed(900), probed(2600)
    assert small.output_bytes == pytest.approx(large.output_bytes, rel=0.3)


def test_slides_that_cannot_be_read_do_not_count(model: Path, scan: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    broken = (tmp_path / "broken.svs", None)
    good, tissue = (scan, None), TissueSettings()
    assert tile_size_for([broken, good], model, 30.0, tissue) == tile_size_for([good], model, 30.0, tissue)
    assert tile_size_for([broken], model, 30.0, tissue) == 256


@pytest.mark.parametrize("name", ["unreadable.svs", "cmu_zeroed_tile.svs"])
def test_a_slide_that_opens_and_then_fails_does_not_count(model: Path, scan: Path, shared_data: Path, name: str) -> None:
    damaged, good, tissue = (shared_data / "damaged" / name, 1.0), (scan, None), TissueSettings()
    assert tile_size_for([damaged, good], model, 30.0, tissue) == tile_size_for([good], model, 30.0, tissue)


def test_what_was_measured_is_not_measured_again(scan: Path, model: Path, cache: Path) -> None:
    def size() -> int:
        return tile_size_for([(scan, None)], model, 3.0, TissueSettings())

    first = size()
    (kept,) = (cache / "fullfield" / "probes").iterdir()
    found = kept.read_text()
    assert size() == first
    assert kept.read_text() == found
    kept.write_text(json.dumps({**json.loads(found), "bytes_per_pixel": 1e6}))
    with pytest.raises(ClusterError):
        size()
    kept.write_text(found[:20])  # a damaged file is worth no more than none
    assert size() == first
    assert set(json.loads(kept.read_text())) == set(json.loads(found))


def test_a_process_that_has_run_tiles_measures_as_a_fresh_one(scan: Path, tmp_path: Path) -> None:
    wide = replace(spec(), width=32)
    save(tmp_path / "model", wide, build_network(wide).eval())
    code = (
        "import sys; from pathlib import Path; from pipeline.config import *; from pipeline.tiling import foresee;"
        "ask = (TissueSettings(), SegmentationSettings(tile_size=4096), EngineSettings(), 1);"
        "print(*(foresee(Path(sys.argv[1]), None, Path(sys.argv[2]), *ask).peak_bytes for _ in range(2)))"
    )
    environment = {**os.environ, **worker_environment(1)}
    command = [sys.executable, "-c", code, scan, tmp_path / "model"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    first, second = map(int, told.split())
    assert second == pytest.approx(first, rel=0.2)


def test_what_was_measured_is_kept_for_one_model_engine_scale_and_gpu(
    model: Path, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, torch_engine, other = open_slide(scan), EngineSettings(backend="torch"), tmp_path / "other"
    save(other, spec(), build_network(spec()).eval())
    ways = [torch_engine, *(torch_engine.model_copy(update=more) for more in ({"precision": "fast"}, {"flips": True}))]
    paths = [kept_probe(slide, spec(), model, way) for way in ways]
    paths += [kept_probe(slide, spec(), other, torch_engine)]
    paths += [kept_probe(slide, replace(spec(), mpp=2.0), model, torch_engine)]
    assert kept_probe(slide, spec(), model, torch_engine) == paths[0]
    monkeypatch.setattr("pipeline.probe.has_gpu", lambda: True)
    for name in ("A100", "T4"):
        monkeypatch.setattr("pipeline.engine.device_name", lambda own=name: own)
        paths.append(kept_probe(slide, spec(), model, torch_engine))
    assert len(set(paths)) == 7


def test_an_output_keeps_its_tile_size_and_the_user_counts_before_all(model: Path, scan: Path, tmp_path: Path) -> None:
    settings, tissue = SegmentationSettings(), TissueSettings()
    old, new = (SlideJob(name, scan, None, model, tmp_path / name, settings, tissue) for name in ("old", "new"))
    started = replace(old, settings=SegmentationSettings(tile_size=136))
    assert not plan_slide(started).finished
    with connect(ClusterSettings(workers=0)) as cluster:
        sizes = [job_tile_size(job) for job in with_tile_sizes([old, new], cluster, None)]
        assert sizes[0] == 136
        assert sizes[1] % 256 == 0
        said = replace(new, settings=SegmentationSettings(tile_size=99))
        assert [job_tile_size(job) for job in with_tile_sizes([said, old], cluster, None)] == [99, 136]
        other = replace(old, settings=SegmentationSettings(tile_size=512))
        with pytest.raises(CanvasError, match="tile_size 136"):
            plan_slide(with_tile_sizes([other], cluster, None)[0])
    assert plan_slide(old).blocks == plan_slide(started).blocks
    other_choice = replace(old, chosen_tile_size=512)  # of another command, which began before the canvas was there
    assert plan_slide(other_choice).blocks == plan_slide(started).blocks
    assert not is_finished(new)


def test_slides_that_are_left_after_a_kill_get_the_tiles_that_they_would_have_got(
    model: Path, scan: Path, tmp_path: Path
) -> None:
    write_slide(np.full((200, 300, 3), 120, np.uint8), tmp_path / "small.tiff", 1.0)
    paths, ask = (scan, tmp_path / "small.tiff"), (SegmentationSettings(), TissueSettings())
    jobs = [SlideJob(path.stem, path, None, model, tmp_path / path.stem, *ask) for path in paths]
    with connect(ClusterSettings(workers=0)) as cluster:
        chosen = with_tile_sizes(jobs, cluster, 30.0)
        assert job_tile_size(with_tile_sizes(jobs[1:], cluster, 30.0)[0]) < job_tile_size(chosen[1])
        plan_slide(chosen[0])
        left = with_tile_sizes(jobs, cluster, 30.0)
    assert [job_tile_size(job) for job in left] == [job_tile_size(job) for job in chosen]


class Deadly:
    """Runs tasks here; whoever is given a slide called `deadly` is dead."""

    description = "here"

    def __init__(self) -> None:
        self.outcomes, self.deaths = list[Outcome](), 0

    def submit(self, key, function, slides, *arguments) -> None:
        if any(path.stem == "deadly" for path, _ in slides):
            self.deaths += 1
            self.outcomes.append(Outcome(key, error=WorkerError("tile_size_for", "deaths", "life", "Delete it.")))
        else:
            self.outcomes.append(Outcome(key, function(slides, *arguments)))

    def prepare(self, function, *arguments) -> None:
        pass

    def __iter__(self) -> Iterator[Outcome]:
        while self.outcomes:
            yield self.outcomes.pop()


def test_a_slide_that_kills_its_workers_does_not_decide(model: Path, scan: Path, tmp_path: Path) -> None:
    settings, tissue = SegmentationSettings(), TissueSettings()
    fatal, good = (
        SlideJob(path.stem, path, None, model, tmp_path / path.stem, settings, tissue) for path in (Path("deadly.svs"), scan)
    )
    sizes = {job_tile_size(job) for job in with_tile_sizes([fatal, good], Deadly(), None)}
    assert sizes == {job_tile_size(with_tile_sizes([good], Deadly(), None)[0])}
    for jobs, tries in (([fatal], 1), ([fatal] * 9, 1 + 3)):
        crew = Deadly()
        with pytest.raises(WorkerError):
            with_tile_sizes(jobs, crew, None)
        assert crew.deaths == tries


@pytest.mark.parametrize(("architecture", "tile"), product(["fcn", "heatmap"], [256, 512]))
def test_chosen_sizes_have_chunks_of_their_own(architecture: str, tile: int, tmp_path: Path) -> None:
    output_stride = 4 if architecture == "heatmap" else 1
    shape = lattice(1301, 907).shrink(output_stride)
    canvas = create_canvas(tmp_path / "out.ome.zarr", shape, CLASSES, tile // output_stride, {})
    assert canvas.write_size % canvas.chunk == 0
    assert canvas.chunk >= 64


def test_a_real_engine_is_probed(model: Path, scan: Path) -> None:
    from pipeline.checkpoint import load

    slide, engine = open_slide(scan), TorchEngine(*load(model))
    found = probe(slide, slide.base, engine, Roi(600, 400, 1, 1), stitching(engine.spec, blended=False))
    assert found.bytes_per_pixel > 12  # the normalised window alone
    assert found.base_bytes > 5e7
