"""Blended windows are MONAI's sliding window, whoever computes which tile; and nothing blended passes for exact."""

import json
import weakref
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers.utils import sliding_window_inference

from pipeline import checkpoint
from pipeline.architectures import build_network
from pipeline.blending import Windows, blend
from pipeline.canvas import open_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.engine import TorchEngine
from pipeline.errors import NetworkError
from pipeline.exactness import comparisons
from pipeline.footprint import with_footprint
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.graph import GraphNetwork
from pipeline.grid import Grid
from pipeline.metrics import confusion
from pipeline.network import ModelSpec
from pipeline.patches import Source
from pipeline.phantom import render, write_slide
from pipeline.settings import ClusterSettings, EngineSettings, SegmentationSettings, TissueSettings
from pipeline.slide import Slide, open_slide
from pipeline.stitching import stitching, usual
from pipeline.team import Alone
from pipeline.tiling import choose, foresee
from pipeline.tissue import Tissue
from pipeline.validation import plan_validation, validate
from workflows.plan import plan
from workflows.segment import segment
from workflows.verify import verify

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
SIZES = [(301, 203), (131, 50), (40, 31), (64, 97)]
HERE, TORCH = ClusterSettings(workers=0), EngineSettings(backend="torch")

pytestmark = pytest.mark.usefixtures("one_thread")


def model(architecture: str, depth: int = 2, **more: object) -> tuple[ModelSpec, torch.nn.Module]:
    """A network with random weights and its spec; windows of 64 pixels."""
    torch.manual_seed(1)
    values = {"classes": CLASSES, "mpp": 1.0, "patch_size": 64, "width": 4, "depth": depth, **more}
    spec = ModelSpec(architecture=architecture, **values)
    network = build_network(spec)
    with torch.no_grad():
        for _ in range(8):
            network.train()(torch.randn(4, 3, 64, 96))
    return with_footprint(spec, network.eval()), network


GLOBAL = model("unet", norm="instance", halo=None)
MODELS = {"instance": GLOBAL, "basic": model("basic_unet", 4, norm="instance", halo=None), "heatmap": model("heatmap", 3)}
ENGINES = {name: TorchEngine(*made) for name, made in MODELS.items()}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Slide]:
    """Slides larger and smaller than a window, along one side and along both."""
    image, folder = render(9, 401, 303, 1.0, spread=3)[0], tmp_path_factory.mktemp("slides")
    found = {}
    for width, height in SIZES:
        path = folder / f"{width}x{height}.tiff"
        write_slide(image[:height, :width], path, 1.0)
        found[width, height] = open_slide(path)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the UNet with instance norm."""
    path = tmp_path_factory.mktemp("global") / "model"
    checkpoint.save(path, *GLOBAL)
    return path


def by_monai(slide: Slide, engine: TorchEngine) -> np.ndarray:
    """The whole slide at once by MONAI, continued with glass to whole pixels of the answer: (classes, rows, columns)."""
    spec, lattice = engine.spec, slide.base.at(Mpp.square(engine.spec.mpp))
    whole = lattice.shrink(spec.output_stride).roi
    padded = Lattice(whole.width * spec.output_stride, whole.height * spec.output_stride, lattice.mpp)
    image = torch.from_numpy(slide.read(padded.roi, lattice).astype(np.float32)).permute(2, 0, 1)[None]

    def run(windows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(engine(windows.permute(0, 2, 3, 1).numpy().astype(np.uint8)))

    answer = sliding_window_inference(image, (64, 64), 1, run, overlap=0.25, mode="gaussian", cval=255)
    assert isinstance(answer, torch.Tensor)
    return answer[0].numpy()


def blended(slide: Slide, engine: TorchEngine, tile: int) -> np.ndarray:
    """The answer of tiles of a size, put together; NaN where none wrote."""
    way = stitching(engine.spec, blended=True)
    grid = way.grid(slide.base.at(Mpp.square(engine.spec.mpp)), tile)
    canvas = np.full((3, *grid.lattice.shrink(engine.spec.output_stride).shape), np.nan, np.float32)
    for cut, probabilities in way.predict(slide, grid, grid, engine):
        canvas[(slice(None), *cut.target(engine.spec.output_stride).slices())] = probabilities
    return canvas


@pytest.mark.parametrize("size", [32, 63, 64, 160, 256])
@pytest.mark.parametrize("shape", [(900, 701), (160, 160), (159, 320), (31, 1000), (1, 1), (416, 385)])
def test_windows_lie_and_weigh_as_monai_s(size: int, shape: tuple[int, int]) -> None:
    lattice = Lattice(shape[1], shape[0], Mpp.square(1.0))
    windows = Windows(size, int(size * 0.75), 1)
    half = [max(size - side, 0) // 2 for side in shape]
    padded = [max(side, size) for side in shape]
    interval = [size if side == size else int(size * 0.75) for side in padded]
    expected = [
        (rows.start - half[0], columns.start - half[1])
        for rows, columns in dense_patch_slices(padded, (size, size), interval)
    ]
    assert [(window.y, window.x) for window in windows.over(lattice.roi, lattice)] == expected
    assert all(window.shape == (size, size) for window in windows.over(lattice.roi, lattice))
    assert np.abs(windows.weights() - compute_importance_map((size, size), mode="gaussian").numpy()).max() < 1e-6


# MONAI puts a small image in the middle of its window wherever that is, off the pixels of a coarser answer too.
@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in ENGINES for size in SIZES if name != "heatmap" or min(size) >= 64], ids=str
)
def test_the_streamed_answer_is_monai_s_of_the_whole_slide(slides: dict, name: str, size: tuple[int, int]) -> None:
    slide, engine = slides[size], ENGINES[name]
    expected = by_monai(slide, engine)
    for tile in (96, 4096):
        assert np.abs(blended(slide, engine, tile) - expected).max() < 1e-5
    assert expected.std() > 1e-3  # an answer that could be wrong


@pytest.mark.parametrize("name", ENGINES)
def test_a_tile_is_the_same_to_the_bit_whatever_is_computed_beside_it(slides: dict, name: str) -> None:
    slide, engine = slides[301, 203], ENGINES[name]
    assert np.array_equal(blended(slide, engine, 64), blended(slide, engine, 200))
    way = stitching(engine.spec, blended=True)
    grid = way.grid(slide.base, 64)
    together = {tile.index: answer for tile, answer in way.predict(slide, grid, grid, engine)}
    for index in ((0, 0), (1, 2), grid[grid.shape[0] - 1, grid.shape[1] - 1].index):
        ((_, alone),) = way.predict(slide, grid, [grid[index]], engine)
        assert np.array_equal(alone, together[index])


def test_only_answers_that_a_tile_or_the_next_one_needs_are_held(slides: dict) -> None:
    slide, windows, given = slides[301, 203], Windows(16, 12, 1), list[weakref.ref[np.ndarray]]()
    held = list[int]()

    class Blank:
        spec = GLOBAL[0]

        def __call__(self, pixels: np.ndarray) -> np.ndarray:
            answer = np.zeros((1, 3, *pixels.shape[1:3]), np.float32)
            given.append(weakref.ref(answer))
            held.append(sum(each() is not None for each in given))
            return answer

    grid = Grid(slide.base, 32, 0, 4)
    needed = [(tile.write_roi.right, set(windows.over(tile.write_roi, slide.base))) for tile in grid]
    most = max(len({each for each in one if each.right > edge} | other) for (edge, one), (_, other) in pairwise(needed))
    for _ in blend(slide, grid, grid, Blank(), windows):
        pass
    assert max(held) <= most < len(given) / 4


def test_an_answer_coarser_than_the_interval_still_lies_on_its_own_pixels() -> None:
    spec = ModelSpec(
        architecture="heatmap", classes=CLASSES, mpp=1.0, patch_size=96, width=4, depth=5, output_stride=32, stride=32
    )
    for width, height in ((500, 333), (500, 40), (31, 1)):
        lattice = Lattice(width, height, Mpp.square(1.0))
        found = Windows.of(spec).over(lattice.roi, lattice)
        assert all(window.x % 32 == window.y % 32 == 0 for window in found)
        covered = np.zeros((height, width), bool)
        for window in found:
            covered[window.intersect(lattice.roi).slices()] = True
        assert covered.all()


def test_a_network_that_is_not_local_is_refused_everywhere_with_the_way_out(
    folder: Path, slides: dict, tmp_path: Path
) -> None:
    spec = checkpoint.load_spec(folder)
    assert spec.halo is None and "halo: null" in (folder / "model.yaml").read_text()
    slide = slides[301, 203].path
    calls = [
        lambda: stitching(spec, blended=False),
        lambda: choose(spec, [], None, None),
        lambda: segment([slide], [str(folder)], tmp_path / "out", None, None, HERE, TORCH),
        lambda: plan(slide, str(folder), None, None, EngineSettings(), False, None, False),
        lambda: verify(slide, str(folder), None, TORCH, False),
    ]
    for call in calls:
        with pytest.raises(NetworkError, match="--blend"):
            call()
    assert not (tmp_path / "out").exists()


def test_its_checkpoint_holds_no_graph_and_gives_the_same_answers(folder: Path, slides: dict) -> None:
    spec, network = checkpoint.load(folder)
    assert spec == GLOBAL[0] and not isinstance(network, GraphNetwork)
    window = slides[301, 203].read(slides[301, 203].base.roi, slides[301, 203].base)[None, :96, :160]
    assert np.array_equal(TorchEngine(spec, network)(window), ENGINES["instance"](window))


def test_openvino_gives_the_same_answers(slides: dict, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from pipeline.openvino_engine import OpenVinoEngine
    from pipeline.openvino_graph import export

    slide = slides[301, 203]
    other = OpenVinoEngine(GLOBAL[0], export(*GLOBAL, tmp_path / "graph"))
    assert np.abs(blended(slide, other, 96) - by_monai(slide, ENGINES["instance"])).max() < 1e-5


@dataclass
class Drawn:
    """A truth of which all is known."""

    base: Lattice
    mask: np.ndarray
    remarks: tuple[str, ...] = ()

    def known_roi(self) -> Roi:
        return self.base.roi

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        truth: np.ndarray = self.mask[roi.slices()]
        return truth


def test_a_network_that_is_not_local_is_validated_as_it_is_used(slides: dict) -> None:
    slide, engine = slides[301, 203], ENGINES["instance"]
    truth = Drawn(slide.base, np.random.default_rng(0).integers(0, 3, slide.base.shape).astype(np.uint8))
    expected = confusion(truth.mask, by_monai(slide, engine).argmax(axis=0).astype(np.uint8), 3)
    tissue = Tissue(np.ones(slide.base.shape, bool), slide.base)
    opened = {"slide": lambda: (Source(slide, truth, slide.base), tissue)}
    found, unread = validate(plan_validation(opened, engine.spec, slide.base.roi.area, 0, Alone()), engine)
    assert (found == expected).all() and not unread


def shards(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("c/**/*") if path.is_file()}


def test_a_blended_segmentation_says_so_and_is_resumed_to_the_same_bytes(
    folder: Path, slides: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = slides[301, 203]
    arguments = ([slide.path], [str(folder)], tmp_path, None, 96, HERE, TORCH)
    assert segment(*arguments, blend=True) == 0
    output = tmp_path / "slides" / "301x203"
    provenance, before = json.loads((output / "provenance.json").read_text()), shards(output)
    assert provenance["exact"] is False
    assert provenance["stitching"] == provenance["identity"]["blend"]
    assert "windows of 64 px every 48 px" in provenance["stitching"]
    labels = open_canvas(output / "segmentation.ome.zarr").read_labels(slide.base.roi)
    examined = labels != IGNORED
    assert examined.mean() > 0.5
    assert (labels == by_monai(slide, ENGINES["instance"]).argmax(0))[examined].all()
    finest = output / "segmentation.ome.zarr" / "labels" / "classes" / "0" / "c"
    (output / "provenance.json").unlink()
    (finest / "1" / "2").unlink()
    assert segment(*arguments, blend=True) == 0
    assert shards(output) == before


def test_exact_and_blended_output_do_not_mix(slides: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "model", *model("fcn"))
    arguments = ([slides[301, 203].path], [str(tmp_path / "model")], tmp_path, None, 96, HERE, TORCH)
    assert segment(*arguments) == 0
    provenance = json.loads((tmp_path / "slides" / "301x203" / "provenance.json").read_text())
    assert provenance["exact"] is True and provenance["stitching"].startswith("halo ")
    assert "blend" not in provenance["identity"]
    assert segment(*arguments, blend=True) == 1
    assert "made by another run" in "".join(capsys.readouterr().out.split("\n")).replace("  ", " ")


@pytest.mark.parametrize("name", ["instance", "heatmap"])
def test_what_verify_reports_is_the_distance_from_one_forward_pass(slides: dict, name: str) -> None:
    slide, engine = slides[301, 203], ENGINES[name]
    tissue = Tissue(np.ones((3, 4), bool), slide.base.at(Mpp.square(100.0)))
    (found,) = comparisons(slide, tissue, slide.base, engine, stitching(engine.spec, blended=True))
    grid = stitching(engine.spec, blended=True).grid(slide.base, 64)
    whole = engine(slide.read(grid.padded.roi, grid.lattice)[None])[0]
    reference = by_monai(slide, engine)
    whole = whole[:, : reference.shape[1], : reference.shape[2]]
    assert found.difference == pytest.approx(np.abs(whole - reference).max(), abs=1e-5)
    assert found.mean_difference == pytest.approx(np.abs(whole - reference).mean(), abs=1e-5)
    assert found.label_changes == (whole.argmax(0) != reference.argmax(0)).sum()
    assert not found.exact and (found.label_changes > 0 or name == "heatmap")


def test_verify_tells_how_far_off_it_is_and_fails(folder: Path, slides: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(slides[301, 203].path, str(folder), None, TORCH, True) == 1
    printed = capsys.readouterr().out
    assert "NOT exact, as asked" in printed and "mean difference" in printed and "windows of 64 px" in printed


def test_a_plan_of_blended_windows_counts_their_overlap(folder: Path, slides: dict) -> None:
    wanted = SegmentationSettings(blend=True, tile_size=128)
    found = foresee(slides[301, 203].path, None, folder, TissueSettings(), wanted, EngineSettings(), workers=1)
    assert found.tiles == 6 and found.tile_size == 128
    assert found.pixels == 301 * 203  # of which tiles of 128 px at the edges write but a part
    assert found.halo_cost == pytest.approx(6 * 128**2 * (64 / 48) ** 2 * 1.5 / found.pixels, rel=1e-4)
    assert found.seconds > 0 and found.peak_bytes > 0


def test_what_is_local_is_exact_unless_said_otherwise() -> None:
    assert usual(MODELS["heatmap"][0]).exact and not usual(GLOBAL[0]).exact
    assert not stitching(MODELS["heatmap"][0], blended=True).exact
