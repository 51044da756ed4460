"""OpenVINO against torch in float64, tiles against the whole, and processes that share a cache."""

import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")

from pipeline import openvino_engine, openvino_graph
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.engine import TorchEngine
from pipeline.errors import EngineError
from pipeline.exactness import TOLERANCE, compare
from pipeline.footprint import with_footprint
from pipeline.geometry import Mpp, Roi
from pipeline.graph import GraphNetwork
from pipeline.network import ModelSpec, activation, normalise
from pipeline.openvino_engine import OpenVinoEngine, beside_int8, half
from pipeline.openvino_graph import GRAPH, export, graph_digest, quantise
from pipeline.phantom import render, write_slide
from pipeline.settings import Precision
from pipeline.slide import open_slide
from pipeline.stitching import stitching
from pipeline.tracing import trace

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
REAL = {"CMU-1-Small-Region.svs": None, "tcga-cr-7395-01a-01-ts1.svs": 0.25, "boxes.tiff": 1.0}  # and um/px, if untold
IMAGE = render(5, 641, 383, 1.0, spread=3)[0]
SIZES = {"fcn": 2, "unet": 3, "heatmap": 3, "basic_unet": 4, "classifier": 2}
CALIBRATED = ("fcn", "unet", "heatmap")  # to do so takes seconds
WIDTHS = {"unet": 16}  # so that its upsampling is of both forms


def network(architecture: str) -> tuple[ModelSpec, torch.nn.Module]:
    """A network with random weights, whose batch norms have seen some noise."""
    width, depth = WIDTHS.get(architecture, 4), SIZES[architecture]
    spec = ModelSpec(architecture=architecture, classes=CLASSES, mpp=1.0, patch_size=32, width=width, depth=depth)
    torch.manual_seed(2)
    made = build_network(spec)
    with torch.no_grad():
        for _ in range(8):
            made.train()(torch.randn(4, 3, 64, 96))
    return with_footprint(spec, made.eval()), made


NETWORKS = {name: network(name) for name in SIZES}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return {name: export(*NETWORKS[name], folder / name) for name in SIZES}


@pytest.fixture(scope="module")
def int8(graphs: dict[str, Path]) -> dict[str, Path]:
    patches = [IMAGE[y : y + 64, x : x + 96] for y in range(0, 300, 100) for x in range(0, 500, 250)]
    return {name: quantise(graphs[name], patches, graphs[name].parent / "int8") for name in CALIBRATED}


@pytest.mark.parametrize("architecture", SIZES)
def test_fp32_is_what_float64_gives(architecture: str, graphs: dict[str, Path]) -> None:
    spec, made = NETWORKS[architecture]
    engine = OpenVinoEngine(spec, graphs[architecture])
    windows = np.stack([IMAGE[:96, :160], IMAGE[200:296, 300:460]])
    with torch.no_grad():
        truth = activation(deepcopy(made).double()(normalise(windows, spec).double())).numpy()
    answer = engine(windows)
    assert answer.dtype == np.float32 and answer.shape == truth.shape
    assert np.abs(answer - truth).max() < 1e-6
    other = engine(np.ascontiguousarray(windows[:1, :64, :128]))
    assert other.shape[2:] == (64 // spec.output_stride, 128 // spec.output_stride)


def test_an_answer_outlives_the_next_call(graphs: dict[str, Path]) -> None:
    engine = OpenVinoEngine(NETWORKS["fcn"][0], graphs["fcn"])
    first = engine(IMAGE[None, :64, :96])
    kept = first.copy()
    engine(IMAGE[None, 100:164, 100:196])
    assert (first == kept).all()


def test_only_what_flips_need_is_held(graphs: dict[str, Path]) -> None:
    """A request holds all activations: a worker would take as much again for a small slide of another size."""
    engine = OpenVinoEngine(NETWORKS["fcn"][0], graphs["fcn"])
    for windows in (IMAGE[None, :64, :96], IMAGE[None, :96, :64], IMAGE[None, :64, :96]):
        engine(windows)
    assert set(engine._requests) == {(1, 64, 96, 3), (1, 96, 64, 3)}
    for width in (128, 160):
        engine(IMAGE[None, :64, :width])
        assert set(engine._requests) == {(1, 64, width, 3)}


@pytest.mark.parametrize("cached", [True, False])
def test_what_a_cache_forgets_is_not_missed(graphs: dict[str, Path], tmp_path: Path, cached: bool) -> None:
    """By a process that meets windows of another shape after days."""
    spec, cache = NETWORKS["unet"][0], tmp_path / "compiled"
    shutil.copytree(graphs["unet"].parent, tmp_path / "graph")
    engine = OpenVinoEngine(spec, tmp_path / "graph" / GRAPH, "exact", cache if cached else None)
    expected = [OpenVinoEngine(spec, graphs["unet"])(IMAGE[None, :64, :width]) for width in (96, 128)]
    assert (engine(IMAGE[None, :64, :96]) == expected[0]).all()
    shutil.rmtree(tmp_path / "graph")
    shutil.rmtree(cache, ignore_errors=True)
    assert (engine(IMAGE[None, :64, :128]) == expected[1]).all()
    assert len(list(cache.glob("*.blob"))) == cached


def test_threads_get_their_own_answers(graphs: dict[str, Path]) -> None:
    """As a server's do, and those of a Dask worker with several."""
    engine = OpenVinoEngine(NETWORKS["fcn"][0], graphs["fcn"])
    windows = [IMAGE[None, y : y + 128, :160] for y in (0, 64, 128, 200)]
    alone = [engine(window) for window in windows]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(engine, windows * 10))
    assert all((answer == own).all() for answer, own in zip(answers, alone * 10, strict=True))


def test_graphs_are_for_all_to_read(graphs: dict[str, Path]) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert graphs["fcn"].parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_graph_network_gives_the_same(graphs: dict[str, Path], tmp_path: Path) -> None:
    spec, made = NETWORKS["unet"]
    lean = GraphNetwork(trace(made, spec), made.state_dict())
    windows = IMAGE[None, :96, :160]
    answers = [OpenVinoEngine(spec, graph)(windows) for graph in (graphs["unet"], export(spec, lean, tmp_path / "lean"))]
    assert np.abs(answers[0] - answers[1]).max() < 1e-6


def test_threads_wander_and_fp32_is_fp32(graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = OpenVinoEngine(NETWORKS["fcn"][0], graphs["fcn"])
    engine(IMAGE[None, :64, :96])
    compiled = next(iter(engine._requests.values())).get_compiled_model()
    found = {name: compiled.get_property(name) for name in ("INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING", "NUM_STREAMS")}
    assert found == {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False, "NUM_STREAMS": 1}
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    if hasattr(os, "sched_getaffinity"):
        everywhere = os.sched_getaffinity(0)
        assert all(os.sched_getaffinity(int(task.name)) == everywhere for task in Path("/proc/self/task").iterdir())


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        *((architecture, precision) for architecture in SIZES for precision in ("exact", "fast")),
        *((architecture, "fastest") for architecture in CALIBRATED),
    ],
)
@pytest.mark.parametrize("threads", ["1", "2"])
def test_tiled_equals_whole(
    architecture: str,
    precision: Precision,
    threads: str,
    graphs: dict[str, Path],
    int8: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    write_slide(IMAGE, tmp_path / "slide.tiff", 1.0)
    slide, spec = open_slide(tmp_path / "slide.tiff"), NETWORKS[architecture][0]
    lattice = slide.base.at(Mpp.square(spec.mpp))
    if precision == "fast" and beside_int8() != half():
        pytest.skip("a processor without half precision")
    engine = OpenVinoEngine(spec, (int8 if precision == "fastest" else graphs)[architecture], precision)
    way = stitching(spec, blended=False)
    found = compare(slide, way.grid(lattice, 160), lattice.roi, engine, way)
    assert found.pixels == -(-641 // spec.output_stride) * -(-383 // spec.output_stride)
    assert found.exact, found
    assert found.difference <= TOLERANCE


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_tiled_equals_whole_on_real_slides(
    architecture: str, backend: str, graphs: dict[str, Path], tmp_path: Path, shared_data: Path, one_thread: None
) -> None:
    """In their midst, over the corner of a tile; what `fullfield verify` compares."""
    spec, made = NETWORKS[architecture]
    engine = TorchEngine(spec, made) if backend == "torch" else OpenVinoEngine(spec, graphs[architecture], "exact", tmp_path)
    way = stitching(spec, blended=False)
    for name, mpp in REAL.items():
        slide = open_slide(shared_data / "slides" / name, mpp)
        lattice = slide.base.at(Mpp.square(spec.mpp))
        grid = way.grid(lattice, 96)
        tile = grid[grid.shape[0] // 2, grid.shape[1] // 2].write_roi
        window = Roi(tile.x - 48, tile.y - 32, 112, 96)
        assert slide.read(window, lattice).std() > 25
        found = compare(slide, grid, window, engine, way)
        assert found.exact, (name, found)


@pytest.mark.parametrize("precision", ["fast", "fastest"])
def test_below_exact_no_convolution_is_transposed(
    precision: Precision, graphs: dict[str, Path], int8: dict[str, Path]
) -> None:
    """Its order of additions would follow the window; see upsampling.py."""
    if precision == "fast" and beside_int8() != half():
        pytest.skip("a processor without half precision")
    engine = OpenVinoEngine(NETWORKS["unet"][0], (int8 if precision == "fastest" else graphs)["unet"], precision)
    engine(IMAGE[None, :64, :96])
    run = next(iter(engine._requests.values())).get_compiled_model().get_runtime_model()
    kinds = {node.get_rt_info()["layerType"].astype(str) for node in run.get_ops()}
    assert "Convolution" in kinds and "Deconvolution" not in kinds
    assert "ConvolutionBackpropData" in graphs["unet"].read_text()  # exact keeps what is faster so


@pytest.mark.parametrize("architecture", CALIBRATED)
def test_int8_is_int8_and_near(architecture: str, graphs: dict[str, Path], int8: dict[str, Path]) -> None:
    spec = NETWORKS[architecture][0]
    exact = OpenVinoEngine(spec, graphs[architecture])(IMAGE[None, :320, :576])
    small = OpenVinoEngine(spec, int8[architecture], "fastest")(IMAGE[None, :320, :576])
    assert 0 < np.abs(small - exact).max() < 0.2
    assert (small.argmax(1) != exact.argmax(1)).mean() < 0.05
    assert (
        int8[architecture].with_name("network.bin").stat().st_size
        < graphs[architecture].with_name("network.bin").stat().st_size
    )


def test_what_is_not_int8_is_in_half_where_the_processor_has_it(int8: dict[str, Path]) -> None:
    import openvino

    engine = OpenVinoEngine(NETWORKS["fcn"][0], int8["fcn"], "fastest")
    engine(IMAGE[None, :64, :96])
    compiled = next(iter(engine._requests.values())).get_compiled_model()
    expected = half() if half().upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"
    assert beside_int8() == expected
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == expected.replace("fp", "f")


def test_half_precision_only_where_the_processor_has_it(graphs: dict[str, Path]) -> None:
    import openvino

    spec = NETWORKS["fcn"][0]
    if half().upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        windows = IMAGE[None, :96, :160]
        difference = np.abs(
            OpenVinoEngine(spec, graphs["fcn"], "fast")(windows) - OpenVinoEngine(spec, graphs["fcn"])(windows)
        )
        assert 0 < difference.max() < 0.05
    else:
        with pytest.raises(EngineError, match=f"expected one with {half()}"):
            OpenVinoEngine(spec, graphs["fcn"], "fast")


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    spec, made = NETWORKS["unet"]
    from pipeline.checkpoint import save

    save(tmp_path / "model", spec, made)
    np.save(tmp_path / "windows.npy", IMAGE[None, :96, :160])
    code = (
        "import sys, numpy as np; from pathlib import Path; from pipeline import checkpoint;"
        "from pipeline.openvino_engine import OpenVinoEngine; from pipeline.openvino_graph import export;"
        "here = Path(sys.argv[1]); spec, network = checkpoint.load(here / 'model');"
        "graph = export(spec, network, here / 'cache' / 'graph');"
        "answer = OpenVinoEngine(spec, graph, 'exact', here / 'cache')(np.load(here / 'windows.npy'));"
        "np.save(here / f'{sys.argv[2]}.npy', answer)"
    )
    commands = [[sys.executable, "-c", code, str(tmp_path), name] for name in ("first", "second")]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in running] == [0, 0]
    subprocess.run([sys.executable, "-c", code, str(tmp_path), "third"], check=True)
    answers = [np.load(tmp_path / f"{name}.npy") for name in ("first", "second", "third")]
    assert (answers[0] == answers[1]).all() and (answers[0] == answers[2]).all()
    left = sorted(path.suffix or path.name for path in (tmp_path / "cache").iterdir())
    assert left == [".blob", "graph"]


def test_a_damaged_blob_is_made_anew(graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, windows = NETWORKS["fcn"][0], IMAGE[None, :64, :96]
    answer = OpenVinoEngine(spec, graphs["fcn"], "exact", tmp_path)(windows)
    (blob,) = tmp_path.iterdir()
    whole = blob.read_bytes()
    flipped = whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:]
    for damaged in (b"", whole[: len(whole) // 2], flipped):
        blob.write_bytes(damaged)
        assert (OpenVinoEngine(spec, graphs["fcn"], "exact", tmp_path)(windows) == answer).all()
        with monkeypatch.context() as patch:  # what is there now needs no compiling: it is whole
            patch.delattr(OpenVinoEngine, "_compile")
            assert (OpenVinoEngine(spec, graphs["fcn"], "exact", tmp_path)(windows) == answer).all()


def test_what_other_code_compiled_is_not_used(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, windows = NETWORKS["fcn"][0], IMAGE[None, :64, :96]
    OpenVinoEngine(spec, graphs["fcn"], "exact", tmp_path)(windows)
    monkeypatch.setattr(openvino_engine, "source_digest", lambda: "other")
    OpenVinoEngine(spec, graphs["fcn"], "exact", tmp_path)(windows)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_without_room_costs_the_cache_and_not_the_answer(graphs: dict[str, Path], tmp_path: Path) -> None:
    spec, made = NETWORKS["fcn"]
    windows = IMAGE[None, :64, :96]
    answer = OpenVinoEngine(spec, graphs["fcn"])(windows)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # every file ends there, as on a disk that is full
    try:
        assert (OpenVinoEngine(spec, graphs["fcn"], "exact", tmp_path)(windows) == answer).all()
        with pytest.raises(EngineError, match="cannot be written"):
            export(spec, made, tmp_path / "graph")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_cache_keeps_the_shapes_that_were_used_last(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "_KEPT_BLOBS", 2)
    for width in (32, 64, 32, 96):
        OpenVinoEngine(NETWORKS["fcn"][0], graphs["fcn"], "exact", tmp_path)(IMAGE[None, :64, :width])
    assert {blob.name.partition("-")[0] for blob in tmp_path.iterdir()} == {"1x64x32x3", "1x64x96x3"}


def test_a_damaged_graph_says_so(graphs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes(graphs["fcn"].read_bytes()[:400])
    with pytest.raises(EngineError, match="no such file; expected network.xml and network.bin"):
        graph_digest(tmp_path / GRAPH)
    (tmp_path / "network.bin").write_bytes(graphs["fcn"].with_name("network.bin").read_bytes())
    with pytest.raises(EngineError, match="found a damaged graph"):
        OpenVinoEngine(NETWORKS["fcn"][0], tmp_path / GRAPH)(IMAGE[None, :64, :96])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # which is kept quiet where there is but one thread
def test_what_is_left_of_a_damaged_graph_gives_way(graphs: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "graph"
    shutil.copytree(graphs["fcn"].parent, damaged)
    (damaged / GRAPH).unlink()
    assert export(*NETWORKS["fcn"], damaged).is_file()
    (damaged / GRAPH).unlink()

    with ThreadPoolExecutor(4) as pool:  # workers that find it so at once
        written = set(pool.map(lambda _: export(*NETWORKS["fcn"], damaged), range(4)))
    assert written == {damaged / GRAPH}
    assert list(tmp_path.iterdir()) == [damaged]
    answers = [
        OpenVinoEngine(NETWORKS["fcn"][0], graph)(IMAGE[None, :64, :96]) for graph in (damaged / GRAPH, graphs["fcn"])
    ]
    np.testing.assert_array_equal(*answers)


def test_without_the_library_the_error_says_how_to_get_it(graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_graph, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r'pip install .* "\.\[openvino\]"'):
        OpenVinoEngine(NETWORKS["fcn"][0], graphs["fcn"])


def test_a_graph_runs_without_torch_and_reports_to_nobody(graphs: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from pipeline.checkpoint import load_spec;"
        "from pipeline.openvino_engine import OpenVinoEngine;"
        "engine = OpenVinoEngine(load_spec(Path(sys.argv[1])), Path(sys.argv[2]));"
        "engine(np.full((1, 64, 96, 3), 200, np.uint8));"
        "print(sorted({'torch', 'monai', 'nncf'} & set(sys.modules)), sys.modules['openvino_telemetry'])"
    )
    from pipeline.checkpoint import save

    save(tmp_path / "model", *NETWORKS["fcn"])
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(graphs["fcn"])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["[]", "None"]
