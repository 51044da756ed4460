"""How far an engine strays: against a slow count over the whole slide, and through the commands."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml

pytest.importorskip("openvino")

from pipeline import checkpoint, runtime
from pipeline.approval import Deviation, approval, approve, check, require_approval, require_means
from pipeline.classes import IGNORED, Class, Classes
from pipeline.config_file import load_config
from pipeline.errors import EngineError, SlideError
from pipeline.geometry import Lattice, Roi
from pipeline.network import ModelSpec
from pipeline.openvino_engine import beside_int8
from pipeline.patches import PatchIndex, Source
from pipeline.phantom import make_cohort, make_phantom, write_slide
from pipeline.precision import calibration_patches, measure_deviation
from pipeline.probe import kept_probe
from pipeline.settings import Backend, EngineSettings, Precision, SegmentationSettings, TissueSettings
from pipeline.slide import open_slide
from pipeline.slide_job import SlideJob
from pipeline.slide_tasks import plan_slide
from pipeline.tissue import Tissue, find_tissue
from workflows.plan import plan
from workflows.run import run_config
from workflows.segment import segment

pytestmark = pytest.mark.usefixtures("cache")
ROOT = Path(__file__).parents[1]
FAST = EngineSettings(precision="fast", backend="torch", max_label_change=0.01)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fullfield"


@dataclass
class DrawnTruth:
    """A phantom's truth of which only the rectangle `known` is told."""

    base: Lattice
    mask: np.ndarray
    known: Roi
    remarks: tuple[str, ...] = ()

    def known_roi(self) -> Roi:
        return self.known

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        assert lattice == self.base
        answer = np.full(roi.shape, IGNORED, np.uint8)
        common = roi.intersect(self.known)
        answer[common.within(roi).slices()] = self.mask[common.slices()]
        return answer


ALL = 10**9
"""More pixels than there are."""


class Shades:
    """A network of one pixel: the darker, the likelier each next class; `shift` moves all its probabilities."""

    def __init__(self, spec: ModelSpec, shift: float) -> None:
        self.spec, self.shift = spec, shift

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        dark = 1 - windows.astype(np.float32).mean(axis=-1) / 255 + self.shift
        centres = np.linspace(0, 0.6, len(self.spec.classes), dtype=np.float32)
        likely = np.exp(-np.abs(dark[:, None] - centres[None, :, None, None]) * 9)
        answer: np.ndarray = (likely / likely.sum(axis=1, keepdims=True)).astype(np.float32)
        return answer


def spec(classes: int, **more: int) -> ModelSpec:
    named = Classes(tuple(Class(f"class {index}", (index, 0, 0)) for index in range(classes)))
    return ModelSpec(architecture="fcn", classes=named, mpp=1.0, patch_size=32, width=4, depth=2, **more)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Source, Tissue]]:
    """Two phantoms, wider than a tile, of each of which a part is known."""
    folder, found = tmp_path_factory.mktemp("phantoms"), []
    for seed, known in ((1, Roi(101, 57, 611, 405)), (2, Roi(0, 0, 333, 577))):
        made = make_phantom(folder / f"{seed}.tiff", seed, 803, 601, 1.0)
        slide = open_slide(made.slide)
        found.append(
            (Source(slide, DrawnTruth(slide.base, made.truth, known), slide.base), find_tissue(slide, TissueSettings()))
        )
    return found


def as_opened(sources: Sequence[tuple[Source, Tissue]]) -> dict[str, Callable[[], tuple[Source, Tissue]]]:
    return {f"slide {number}": lambda own=own: own for number, own in enumerate(sources)}


@pytest.fixture(scope="module")
def damaged(sources: list[tuple[Source, Tissue]], tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The first of the sources, of whose slide a tile in the midst is zeros."""
    source, _ = sources[0]
    content = bytearray(source.slide.path.read_bytes())
    with tifffile.TiffFile(source.slide.path) as file:
        page = file.pages[0]
        across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
        middle = down // 2 * across + across // 2
        start, length = page.dataoffsets[middle], page.databytecounts[middle]
    content[start : start + length] = bytes(length)
    path = tmp_path_factory.mktemp("damaged") / "damaged.tiff"
    path.write_bytes(content)
    return replace(source, slide=open_slide(path))


def dice(truth: np.ndarray, labels: np.ndarray, index: int) -> float:
    return float(2 * ((truth == index) & (labels == index)).sum() / ((truth == index).sum() + (labels == index).sum()))


def test_the_figures_are_those_of_a_slow_count(sources: list[tuple[Source, Tissue]]) -> None:
    model = spec(5, stride=4, halo=8)
    exact, other = Shades(model, 0.0), Shades(model, 0.004)
    truths, firsts, seconds = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for source, tissue in sources:
        image, mask = source.read(source.lattice.roi)
        assert tissue.lattice.mpp.x == tissue.lattice.mpp.y == 8 * source.lattice.mpp.x
        known = (mask != IGNORED) & np.kron(tissue.mask, np.ones((8, 8), bool))[: mask.shape[0], : mask.shape[1]]
        truths.append(mask[known])
        for engine, answers in ((exact, firsts), (other, seconds)):
            answers.append(engine(image[None])[0][:, known])
    truth, first, second = (np.concatenate(parts, axis=-1) for parts in (truths, firsts, seconds))
    found, _ = measure_deviation(exact, other, as_opened(sources), ALL, 0)
    assert found.pixels == truth.size > 100_000
    assert 0 < found.label_change == (first.argmax(0) != second.argmax(0)).mean()
    assert found.largest_difference == np.abs(first - second).max()
    dices = [[dice(truth, answer.argmax(0), index) for index in range(5)] for answer in (first, second)]
    assert found.dice_change == pytest.approx(np.abs(np.subtract(*dices)).max(), abs=1e-12)


def test_of_much_tissue_a_part_is_looked_at(sources: list[tuple[Source, Tissue]]) -> None:
    engines, slides = (Shades(spec(5), 0.0), Shades(spec(5), 0.004)), as_opened(sources)
    whole, part = (measure_deviation(*engines, slides, most, 0)[0] for most in (ALL, 300_000))
    assert 0 < part.pixels < whole.pixels
    assert part == measure_deviation(*engines, slides, 300_000, 0)[0], "the same part for a seed"
    assert part.label_change == pytest.approx(whole.label_change, rel=0.5)


def test_an_engine_does_not_stray_from_itself(sources: list[tuple[Source, Tissue]]) -> None:
    found, _ = measure_deviation(Shades(spec(5), 0.0), Shades(spec(5), 0.0), as_opened(sources), ALL, 0)
    assert (found.label_change, found.dice_change, found.largest_difference) == (0, 0, 0)


def test_what_is_no_number_has_changed(sources: list[tuple[Source, Tissue]]) -> None:
    """As in fp16 that overflows: of all classes, or of one."""

    class Overflowing(Shades):
        def __call__(self, windows: np.ndarray) -> np.ndarray:
            answer = super().__call__(windows)
            answer[:, :, windows[0].sum(axis=-1) % 2 == 0] = np.nan
            answer[:, 3, windows[0].sum(axis=-1) % 3 == 0] = np.nan
            return answer

    source, tissue = sources[0]
    image, mask = source.read(source.lattice.roi)
    total = image.sum(axis=-1)[(mask != IGNORED) & tissue.sampled(source.lattice.roi, source.lattice)]
    found, _ = measure_deviation(Shades(spec(5), 0.0), Overflowing(spec(5), 0.0), as_opened([sources[0]]), ALL, 0)
    assert found.pixels == total.size
    assert found.label_change == ((total % 2 == 0) | (total % 3 == 0)).mean()
    assert found.largest_difference == np.inf


def test_what_differs_where_nothing_is_known_is_no_difference(sources: list[tuple[Source, Tissue]]) -> None:
    source, tissue = sources[0]
    image, mask = source.read(source.lattice.roi)
    known = (mask != IGNORED) & tissue.sampled(source.lattice.roi, source.lattice)
    elsewhere = np.setdiff1d(image.sum(axis=-1)[~known], image.sum(axis=-1)[known])
    assert elsewhere.size

    class Elsewhere(Shades):
        def __call__(self, windows: np.ndarray) -> np.ndarray:
            answer = super().__call__(windows)
            answer[:, :, np.isin(windows[0].sum(axis=-1), elsewhere)] = 0.9
            return answer

    found, _ = measure_deviation(Shades(spec(5), 0.0), Elsewhere(spec(5), 0.0), as_opened([sources[0]]), ALL, 0)
    assert found.pixels and (found.label_change, found.dice_change, found.largest_difference) == (0, 0, 0)


def test_slides_that_cannot_be_read_do_not_count_and_are_named(
    sources: list[tuple[Source, Tissue]], damaged: Source
) -> None:
    def none() -> tuple[Source, Tissue]:
        raise SlideError("none.svs", "no such file", "a slide", "Copy it.")

    engines = Shades(spec(5), 0.0), Shades(spec(5), 0.004)
    good = as_opened(sources[1:])
    slides = {"torn": lambda: (damaged, sources[0][1]), **good, "none": none}
    found, unread = measure_deviation(*engines, slides, ALL, 0)
    assert (found, []) == measure_deviation(*engines, good, ALL, 0)
    assert unread == ["torn", "none"]


def test_what_strays_is_refused_with_its_figures() -> None:
    found, model = Deviation(1000, 0.0123, 0.004, 0.31), Path("model")
    with pytest.raises(EngineError, match="1.230% of 1000 pixels.*0.0040.*0.310.*no more than 1.000%.*raise engine.max"):
        check(found, FAST, model)
    check(found, FAST.model_copy(update={"max_label_change": 0.0123}), model)
    with pytest.raises(EngineError, match="no known tissue"):
        check(Deviation(0, 0.0, 0.0, 0.0), FAST, model)
    with pytest.raises(EngineError, match="answers that are no numbers.*engine.precision=exact"):
        check(Deviation(1000, 0.0001, 0.0, np.inf), FAST, model)


def save(folder: Path, width: int) -> Path:
    from pipeline.architectures import build_network

    described = ModelSpec(architecture="heatmap", classes=spec(2).classes, mpp=1.0, patch_size=32, width=width, depth=1)
    checkpoint.save(folder, described, build_network(described))
    return folder


def test_a_worker_that_computes_otherwise_than_approved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gave the order may have looked at another kind of machine."""
    write_slide(np.full((64, 64, 3), 255, np.uint8), tmp_path / "slide.tiff", 1.0)
    job = SlideJob(
        "slide",
        tmp_path / "slide.tiff",
        None,
        save(tmp_path / "model", 4),
        tmp_path / "out",
        SegmentationSettings(tile_size=64),
        TissueSettings(),
        FAST,
    )
    monkeypatch.setattr("pipeline.engine._device", lambda: torch.device("cpu"))
    for able, found in ((True, "never held against exact"), (False, "multiplies bf16")):
        monkeypatch.setattr("pipeline.engine._has_bf16", lambda able=able: able)
        with pytest.raises(EngineError, match=found):
            plan_slide(job)
    assert not job.folder.exists()


def test_an_approval_is_the_models_own(tmp_path: Path) -> None:
    model, found = save(tmp_path / "model", 4), Deviation(1000, 0.001, 0.004, 0.31)
    assert approval(FAST, model) is None
    require_approval(FAST.model_copy(update={"precision": "exact"}), model)
    with pytest.raises(EngineError, match="never held against exact.*fullfield run CONFIG engine.precision=fast"):
        require_approval(FAST, model)
    approve(found, FAST, model)
    require_approval(FAST, model)
    assert approval(FAST, model) == found
    assert approval(FAST.model_copy(update={"backend": "openvino"}), model) is None
    refused = FAST.model_copy(update={"backend": "openvino"})
    with pytest.raises(EngineError):
        approve(Deviation(1000, 0.5, 0.004, 0.31), refused, model)
    assert approval(refused, model) is None
    with pytest.raises(EngineError, match="refused: 50.000% of 1000 pixels.* engine.max_label_change above 0.01"):
        require_approval(refused, model)
    with pytest.raises(EngineError, match="no numbers"):
        approve(Deviation(1000, 0.001, 0.004, np.inf), refused, model)
    assert approval(refused, model) is None
    with pytest.raises(EngineError, match="no known tissue"):
        approve(Deviation(0, 0.0, 0.0, 0.0), refused, model)
    assert approval(refused, model) is None
    save(model, 5)
    assert approval(FAST, model) is None


def test_an_approval_counts_for_the_model_wherever_it_lies(tmp_path: Path, cache: Path) -> None:
    """As in the registry, whose models lie in folders of their own."""
    model, found = save(tmp_path / "out" / "model", 4), Deviation(1000, 0.001, 0.004, 0.31)
    stored = Path(shutil.copytree(model, tmp_path / "artifacts" / "checkpoint"))
    approve(found, FAST, model)
    assert approval(FAST, stored) == found
    beside, kept = runtime.engines_folder(model), next((cache / "engines").iterdir())
    with pytest.raises(EngineError):
        approve(Deviation(1000, 0.5, 0.004, 0.31), FAST.model_copy(update={"flips": True}), model)
    with pytest.raises(EngineError, match="refused: 50.000%"):
        require_approval(FAST.model_copy(update={"flips": True}), stored)
    shutil.rmtree(kept)  # another machine
    with pytest.raises(EngineError, match=f"copy model.engines/{beside.name} of that run to {kept} here"):
        require_approval(FAST, stored)
    shutil.copytree(beside, kept)
    require_approval(FAST, stored)


def test_an_approval_of_one_half_precision_is_none_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "model", 4)
    approve(Deviation(1000, 0.001, 0.004, 0.31), FAST, model)
    other = {"bf16": "fp16", "fp16": "bf16"}[runtime.describe(model, FAST).split()[1].strip(",")]
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    monkeypatch.setattr("pipeline.engine.torch_half", lambda: other)
    assert approval(FAST, model) is None


def test_an_approval_counts_for_the_versions_that_it_was_given_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "model", 4)
    approve(Deviation(1000, 0.001, 0.004, 0.31), FAST, model)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.approval.__version__", "another")
        assert approval(FAST, model) is None
    assert approval(FAST, model) is not None
    monkeypatch.setattr(runtime, "version", lambda library: "another")
    assert approval(FAST, model) is None


@pytest.mark.parametrize("precision", ["exact", "fast", "fastest"])
def test_without_its_library_a_backend_is_told_to_be_missing_and_not_to_stray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    model, way = save(tmp_path / "model", 4), EngineSettings(precision=precision, backend="openvino")
    write_slide(np.full((64, 48, 3), 255, np.uint8), tmp_path / "slide.tiff", 1.0)
    monkeypatch.setattr("pipeline.openvino_graph.installed", lambda: False)
    with pytest.raises(EngineError, match="openvino: found no such library.*pip install"):
        kept_probe(open_slide(tmp_path / "slide.tiff"), spec(2), model, way)
    if precision != "exact":
        with pytest.raises(EngineError, match="openvino: found no such library.*pip install"):
            require_approval(way, model)


def test_an_approval_that_allowed_more_outlasts_a_refusal(tmp_path: Path) -> None:
    model, found = save(tmp_path / "model", 4), Deviation(1000, 0.03, 0.004, 0.31)
    approve(found, FAST.model_copy(update={"max_label_change": 0.05}), model)
    for refused in (found, Deviation(1000, 0.02, 0.004, 0.31)):
        with pytest.raises(EngineError, match="no more than 1.000%"):
            approve(refused, FAST, model)
        assert approval(FAST, model) == found


def test_an_approval_says_whether_it_is_of_all_slides(tmp_path: Path) -> None:
    model, found = save(tmp_path / "model", 4), Deviation(1000, 0.001, 0.004, 0.31)
    assert approval(FAST, model, of_all=True) is None
    for passed_over in (["torn"], []):
        approve(found, FAST, model, passed_over)
        assert approval(FAST, model) == found
        assert approval(FAST, model, of_all=True) == (None if passed_over else found)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"engine": "ENGINE", "found": {"pixels": 3}}'])
def test_a_damaged_approval_says_so(tmp_path: Path, content: str) -> None:
    model = save(tmp_path / "model", 4)
    approve(Deviation(1000, 0.001, 0.004, 0.31), FAST, model)
    (path,) = runtime.engines_folder(model).iterdir()
    path.write_text(content.replace("ENGINE", json.loads(path.read_text())["engine"]))
    with pytest.raises(EngineError, match="a damaged file"):
        approval(FAST, model)


def test_patches_for_calibration_are_the_slides_own(sources: list[tuple[Source, Tissue]]) -> None:
    corners = np.array([[200, 100], [328, 228], [0, 128]])
    source = {"a": sources[0][0], "b": sources[1][0]}
    cells = [source[name].read(Roi(x, y, 50, 50))[1] for name, (x, y) in zip("aab", corners.tolist(), strict=True)]
    shares = np.array([[(mask == index).mean() for index in range(5)] for mask in cells])
    index = PatchIndex(("a", "b"), np.array([0, 0, 1]), corners, shares)
    patches = calibration_patches(index, source, 50, spec(2, stride=16))
    again = calibration_patches(index, source, 50, spec(2, stride=16))
    assert len(patches) == 100 and {patch.shape for patch in patches} == {(64, 64, 3)}
    assert all((one == other).all() for one, other in zip(patches, again, strict=True))
    assert len({patch.tobytes() for patch in patches}) > 90
    images = [one.slide.read(one.lattice.roi, one.lattice) for one in source.values()]
    assert all(any(lies_in(image, patch) for image in images) for patch in patches[:5])


def lies_in(image: np.ndarray, patch: np.ndarray) -> bool:
    """Whether an image holds a square patch, told first by some of its diagonal."""
    size = len(patch)
    height, width = image.shape[0] - size + 1, image.shape[1] - size + 1
    alike = [(image[at:, at:][:height, :width] == patch[at, at]).all(axis=-1) for at in range(0, size, 9)]
    places = np.argwhere(np.logical_and.reduce(alike))
    return any(np.array_equal(image[y : y + size, x : x + size], patch) for y, x in places)


def test_patches_for_calibration_that_cannot_be_read_are_drawn_anew(
    sources: list[tuple[Source, Tissue]], damaged: Source
) -> None:
    corners = [(x, y) for y in range(60, 420, 60) for x in range(110, 650, 60)]
    cells = [damaged.truth.read(Roi(x, y, 50, 50), damaged.lattice) for x, y in corners]
    shares = np.array([[(mask == index).mean() for index in range(5)] for mask in cells])
    index = PatchIndex(("a",), np.zeros(len(corners), int), np.array(corners), shares)
    whole, found = (calibration_patches(index, {"a": one}, 50, spec(2, stride=16)) for one in (sources[0][0], damaged))
    same = [np.array_equal(one, other) for one, other in zip(whole, found, strict=True)]
    assert 20 < sum(same) < 100
    nowhere = replace(index, fractions=shares * [[x // 256 == 2 and y // 256 == 1] for x, y in corners])
    with pytest.raises(SlideError):
        calibration_patches(nowhere, {"a": damaged}, 50, spec(2, stride=16))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of three small phantoms whose run takes seconds."""
    folder = tmp_path_factory.mktemp("project")
    manifest = make_cohort(folder / "cohort", seed=3, slides=3, width=1203, height=901, mpp=1.0)
    config = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    config["output"], config["cohort"]["manifest"] = str(folder / "out"), str(manifest)
    config["network"] = {"architecture": "fcn", "mpp": 4.0, "width": 8, "depth": 2}
    config["tiles"]["patch_size"] = 64
    config["training"] = {
        "epochs": 2,
        "patches_per_epoch": 32,
        "batch_size": 8,
        "learning_rate": 0.01,
        "weight_average": 0.5,
    }
    config["segmentation"], config["cluster"] = {"tile_size": 96}, {"workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("precision", "backend", "lacking", "found"),
    [
        ("fast", "openvino", ("pipeline.openvino_engine._abilities", lambda: ("FP32", "INT8")), "computes in FP32, INT8"),
        ("fast", "torch", ("pipeline.engine._has_bf16", lambda: False), "multiplies bf16"),
        ("exact", "openvino", ("pipeline.openvino_graph.find_spec", lambda name: None), "openvino: found no such library"),
        ("fastest", "auto", ("pipeline.openvino_graph.find_spec", lambda name: name == "openvino" or None), "nncf"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_before_anything_is_begun(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    backend: Backend,
    lacking: tuple[str, Callable[..., object]],
    found: str,
) -> None:
    monkeypatch.setattr("pipeline.engine._device", lambda: torch.device("cpu"))
    monkeypatch.setattr(*lacking)
    asked = [f"engine.precision={precision}", f"engine.backend={backend}", f"output={tmp_path / 'out'}"]
    config = load_config(project / "config.yaml", asked)
    with pytest.raises(EngineError, match=found):
        run_config(config)
    assert not (tmp_path / "out").exists()
    require_means(load_config(project / "config.yaml", [*asked, "cluster={scheduler: 'tcp://elsewhere:8786'}"]))
    model, slide = str(save(tmp_path / "model", 4)), project / "cohort" / "phantom-03.tiff"
    if precision != "fastest":  # whose model needs nncf but once
        with pytest.raises(EngineError, match=found):
            segment([slide], [model], tmp_path / "out", None, 96, config.cluster, config.engine)
        with pytest.raises(EngineError, match=found):
            plan(slide, model, None, None, config.engine, False, None, False)


def test_a_run_holds_int8_against_exact_and_segment_trusts_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(project / "cache"))
    config, model = project / "config.yaml", project / "out" / "model"
    strict = load_config(config, ["engine.precision=fastest", "engine.max_label_change=0"])
    with pytest.raises(EngineError, match=r"engine.precision fastest.*have another label.*engine.max_label_change"):
        run_config(strict)
    slide, where = project / "cohort" / "phantom-03.tiff", load_config(config).cluster
    fastest = EngineSettings(precision="fastest")
    with pytest.raises(EngineError, match="that was refused: "):
        segment([slide], [str(model)], project / "other", None, 96, where, fastest)
    assert run_config(load_config(config, ["engine.precision=fastest", "engine.max_label_change=0.2"])) == 0
    assert "fastest with openvino against exact: " in capsys.readouterr().out
    identity = json.loads((project / "out" / "slides" / "phantom-03" / "provenance.json").read_text())["identity"]
    assert identity["engine"].startswith(f"fastest {beside_int8()}, openvino ")
    assert segment([slide], [str(model)], project / "other", None, 96, where, fastest) == 0
    assert segment([slide], [str(model)], project / "other", None, 96, where, EngineSettings()) == 1
    assert "engine" in capsys.readouterr().out
