"""Several models as one: the mean of whole-slide passes, told as such, and refused where models do not belong together."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml

from pipeline import checkpoint, ensemble
from pipeline.architectures import build_network
from pipeline.canvas import open_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.errors import CheckpointError
from pipeline.files import locked
from pipeline.footprint import with_footprint
from pipeline.geometry import Roi
from pipeline.grid import round_up
from pipeline.network import ModelSpec
from pipeline.normalised import NormalisedSlide, estimate
from pipeline.phantom import make_phantom
from pipeline.runtime import EXACT, load_engine, with_flips
from pipeline.settings import ClusterSettings, EngineSettings, TissueSettings
from pipeline.slide import open_slide
from pipeline.staining import Normalisation
from pipeline.tissue import find_tissue
from workflows.segment import segment
from workflows.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
TORCH = EngineSettings(backend="torch")


def save(folder: Path, seed: int, spec: ModelSpec) -> Path:
    """A model with random weights, whose batch norms have seen some noise."""
    torch.manual_seed(seed)
    network = build_network(spec)
    with torch.no_grad():
        for _ in range(8):
            network.train()(torch.randn(4, 3, 64, 96))
    checkpoint.save(folder, with_footprint(spec, network.eval()), network)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of different footprint and stride, where a fold of a cross-validation would leave them."""
    folder = tmp_path_factory.mktemp("models")
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2)
    specs = (spec, replace(spec, depth=3), replace(spec, architecture="unet", depth=1))
    return [save(folder / f"fold-{seed}" / "model", seed, each) for seed, each in enumerate(specs, start=1)]


@pytest.fixture(scope="module")
def output(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom that a cross-validation's models segmented together, in several tiles."""
    folder = tmp_path_factory.mktemp("output")
    make_phantom(folder / "phantom.tiff", seed=4, width=1201, height=903)
    where = ClusterSettings(workers=0)
    assert segment([folder / "phantom.tiff"], [str(models[0].parents[1])], folder / "out", None, 128, where, TORCH) == 0
    return folder / "out"


def test_the_output_is_the_mean_of_whole_passes(models: list[Path], output: Path) -> None:
    canvas = open_canvas(output / "slides" / "phantom" / "segmentation.ome.zarr")
    slide = open_slide(output.parent / "phantom.tiff")
    spec = ensemble.load_spec(output / "ensemble")
    step = spec.stride
    roi = replace(
        canvas.lattice.roi, width=-(-canvas.lattice.width // step) * step, height=-(-canvas.lattice.height // step) * step
    )
    window = slide.read(roi, canvas.lattice)[None]
    passes = [load_engine(model, TORCH)(window)[0, :, : canvas.lattice.height, : canvas.lattice.width] for model in models]
    mean = np.mean(passes, axis=0, dtype=np.float64)
    labels = canvas.read_labels(canvas.lattice.roi)
    examined = labels != IGNORED
    assert examined.mean() > 0.2
    stored = canvas.read_probabilities(canvas.lattice.roi)[:, examined]
    assert np.abs(stored - 255 * mean[:, examined]).max() <= 0.5 + 1e-3
    best = np.sort(mean, axis=0)
    clear = examined & (best[-1] - best[-2] > 1e-5)
    assert (labels == mean.argmax(axis=0))[clear].all()
    assert any((labels != each.argmax(axis=0))[clear].any() for each in passes)  # it is no member's own answer


def test_the_entropy_map_says_how_undecided_the_mean_is(output: Path) -> None:
    folder = output / "slides" / "phantom"
    canvas = open_canvas(folder / "segmentation.ome.zarr")
    with tifffile.TiffFile(folder / "entropy.ome.tif") as file:
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape for level in levels] == [lattice.shape for lattice in canvas.levels]
    for number, found in enumerate(levels):
        probabilities = canvas.read_probabilities(canvas.levels[number].roi, number).astype(np.float64) / 255
        logarithms = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
        expected = -(probabilities * logarithms).sum(axis=0) / np.log(3) * 255
        assert np.abs(found - np.minimum(expected, 255)).max() <= 0.5 + 1e-3
    assert levels[0].max() > 128
    assert (levels[0][canvas.read_labels(canvas.lattice.roi) == IGNORED] == 0).all()


def test_an_ensemble_is_a_model_whose_tiles_are_exact(output: Path) -> None:
    assert verify(output.parent / "phantom.tiff", str(output / "ensemble"), None, TORCH, blend=False) == 0


def test_each_member_sees_the_slide_in_its_own_stain(models: list[Path], output: Path, tmp_path: Path) -> None:
    spec, dyes = checkpoint.load_spec(models[0]), (((0.6, 0.7, 0.3), (0.2, 0.9, 0.3)), ((0.5, 0.8, 0.3), (0.1, 1.0, 0.2)))
    alike = [replace(spec, halo=0, stride=1, normalisation=Normalisation("macenko", each)) for each in dyes]
    members = [save(tmp_path / str(seed), seed, each) for seed, each in enumerate(alike)]
    path = output.parent / "phantom.tiff"
    where = ClusterSettings(workers=0)
    assert segment([path], [str(member) for member in members], tmp_path / "out", None, 128, where, TORCH) == 0
    canvas = open_canvas(tmp_path / "out" / "slides" / "phantom" / "segmentation.ome.zarr")
    slide = open_slide(path)
    staining = estimate(slide, find_tissue(slide, TissueSettings()), "macenko")
    step, size = ensemble.load_spec(tmp_path / "out" / "ensemble").stride, canvas.lattice
    roi = Roi(0, 0, round_up(size.width, step), round_up(size.height, step))
    seen = [NormalisedSlide(slide, staining, Normalisation("macenko", each)).read(roi, size) for each in dyes]
    assert (seen[0] != seen[1]).any()
    passes = [
        load_engine(member, TORCH)(pixels[None])[0, :, : size.height, : size.width]
        for member, pixels in zip(members, seen, strict=True)
    ]
    examined = canvas.read_labels(size.roi) != IGNORED
    stored = canvas.read_probabilities(size.roi)[:, examined]
    assert np.abs(stored - 255 * np.mean(passes, axis=0)[:, examined]).max() <= 0.5 + 1e-3
    assert verify(path, str(tmp_path / "out" / "ensemble"), None, TORCH, blend=False) == 0


def test_a_single_model_is_itself_and_has_no_entropy_map(models: list[Path], output: Path, tmp_path: Path) -> None:
    assert ensemble.gather(models[:1], tmp_path / "ensemble") == models[0]
    assert ensemble.digest(models[0]) == checkpoint.digest(models[0])
    slide = output.parent / "phantom.tiff"
    assert segment([slide], [str(models[0])], tmp_path, None, 256, ClusterSettings(workers=0), TORCH) == 0
    assert not (tmp_path / "ensemble").exists()
    assert not (tmp_path / "slides" / "phantom" / "entropy.ome.tif").exists()


def test_members_that_do_not_belong_together_are_refused(models: list[Path], tmp_path: Path) -> None:
    spec = checkpoint.load_spec(models[0])
    other = save(tmp_path / "other", 9, replace(spec, mpp=2.0))
    stained = save(tmp_path / "stained", 9, replace(spec, normalisation=Normalisation("macenko", ((1, 0, 0), (0, 1, 0)))))
    blended = [tmp_path / f"{size}" for size in (64, 96)]
    for size, folder in zip((64, 96), blended, strict=True):
        instance = replace(spec, architecture="unet", norm="instance", halo=None, patch_size=size)
        checkpoint.save(folder, instance, build_network(instance))
    cases = (([models[0], other], "mpp 2.0"), ([models[0], models[0]], "a model twice"), (blended, "64 px, 96 px"))
    background = save(tmp_path / "background", 9, replace(spec, rest=1 - (spec.rest or 0)))
    kinds = (([models[0], background], "found rest"), ([models[0], blended[0]], "some of either kind"))
    reinhard = Normalisation("reinhard", ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    means = save(tmp_path / "means", 9, replace(spec, normalisation=reinhard))
    methods = (([models[0], stained], "none, macenko"), ([stained, means], "macenko, reinhard"))
    for wrong, words in (*cases, *kinds, *methods):
        with pytest.raises(CheckpointError, match=words):
            ensemble.gather(wrong, tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


@pytest.mark.parametrize("tissue", [{"mpp": 16.0, "method": "otsu"}, {"mpp": "x"}, 3])
def test_a_way_to_look_for_tissue_that_this_version_does_not_know_is_refused(
    models: list[Path], tmp_path: Path, tissue: object
) -> None:
    spec, network = checkpoint.load(models[0])
    checkpoint.save(tmp_path / "model", spec, network, {"tissue": tissue})
    with pytest.raises(CheckpointError, match="looks for tissue: .* expected settings of mpp, .* Use the version") as caught:
        ensemble.load_tissue(tmp_path / "model")
    assert str(tissue) == caught.value.found


@pytest.mark.parametrize("way", [{"flips": "maybe"}, {"min_region_um2": "lots"}, {"min_region_um2": -1.0}])
def test_a_way_to_segment_that_this_version_does_not_know_is_refused(
    models: list[Path], tmp_path: Path, way: dict[str, object]
) -> None:
    model = Path(shutil.copytree(models[0], tmp_path / "model"))
    content = yaml.safe_load((model / "model.yaml").read_text())
    (model / "model.yaml").write_text(yaml.safe_dump({**content, "lineage": way}))
    with pytest.raises(CheckpointError, match="how its run segments slides: found .* Use the version") as caught:
        with_flips(EXACT, model, None)
    assert caught.value.found == str(way)


def test_a_member_that_is_no_longer_what_it_was_is_refused(models: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(model, tmp_path / str(number))) for number, model in enumerate(models)]
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "ensemble"):  # another command may be gathering other models
            gathered = pool.submit(ensemble.gather, copies, tmp_path / "ensemble")
            with pytest.raises(TimeoutError):
                gathered.result(0.2)
        folder = gathered.result(60)
    assert ensemble.members(folder) == tuple(copies)
    shutil.rmtree(copies[1])
    shutil.copytree(models[0], copies[1])
    with pytest.raises(CheckpointError, match="Put the members back"):
        ensemble.load_spec(folder)
    for damaged in ("members: 3", "members: []", "members: [x]", "x", ""):
        (folder / "ensemble.yaml").write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            ensemble.members(folder)
