"""A heat map is what its classifier says of every patch: at every place, at every border, tiled, and after training."""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from pipeline.architectures import build_learner, build_network, for_slides
from pipeline.canvas import open_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.dense import Classifier, convolutional
from pipeline.engine import TorchEngine
from pipeline.errors import NetworkError
from pipeline.footprint import with_footprint
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.grid import Grid
from pipeline.network import ModelSpec, normalise
from pipeline.phantom import make_cohort, render, write_slide
from pipeline.prediction import predict
from pipeline.settings import TrainingSettings
from pipeline.slide import Slide, open_slide
from pipeline.training import Trainer

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0)), Class("Fat", (255, 255, 0))))
ROOT = Path(__file__).parents[1]


def spec(patch_size: int, depth: int, **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"architecture": "classifier", "classes": CLASSES, "mpp": 1.0, "width": 4}
    return ModelSpec(patch_size=patch_size, depth=depth, **{**values, **changes})


# Patches of an odd and of an even number of cells; of which the convolutions use all, or leave the last pixels.
SPECS = {
    "32 px every 2": spec(32, 1),
    "40 px every 8": spec(40, 3),
    "48 px every 8, odd scale": spec(48, 3, mean=(0.7, 0.6, 0.4), std=(0.15, 0.2, 0.3)),
    "96 px every 16": spec(96, 4),
}
SIZES = [(213, 171), (97, 211), (31, 17), (1, 140), (130, 1)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Slide]:
    """Slides of many sizes, cut from one phantom without glass: smaller than a patch, one pixel wide."""
    image, folder = render(9, 401, 303, 2.0, spread=3)[0], tmp_path_factory.mktemp("sizes")
    for width, height in SIZES:
        write_slide(image[:height, :width], folder / f"{width}x{height}.tiff", 1.0)
    return {(width, height): open_slide(folder / f"{width}x{height}.tiff") for width, height in SIZES}


@cache
def trained(name: str) -> tuple[ModelSpec, Classifier]:
    """A classifier as if it had learnt: batch norms that know such patches, and logits that tell them apart."""
    torch.manual_seed(0)
    classifier, size = build_learner(SPECS[name]), SPECS[name].patch_size
    assert isinstance(classifier, Classifier)
    image = render(9, 401, 303, 2.0, spread=3)[0]
    corners = np.random.default_rng(0).integers(0, 303 - size, (48, 2))
    patches = normalise(np.stack([image[y : y + size, x : x + size] for y, x in corners]), SPECS[name])
    last = classifier.dense[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        for norm in classifier.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        classifier.train()(patches)
        last.weight.mul_(2 / classifier.eval()(patches).std(dim=0)[:, None])
        last.bias.sub_(classifier(patches).mean(dim=0))
    return with_footprint(SPECS[name], for_slides(classifier)), classifier


def patch_by_patch(slide: Slide, lattice: Lattice, model: ModelSpec, classifier: Classifier) -> np.ndarray:
    """(classes, rows, columns): the classifier's answer for the patch centred on each cell, read one by one."""
    cells, stride, size = lattice.shrink(model.stride), model.stride, model.patch_size
    before = (size - stride) // 2
    answers = []
    with torch.inference_mode():
        for row in range(cells.height):
            rois = [Roi(column * stride - before, row * stride - before, size, size) for column in range(cells.width)]
            patches = normalise(np.stack([slide.read(roi, lattice) for roi in rois]), model)
            answers.append(classifier(patches).softmax(dim=1).T.numpy())
    return np.stack(answers, axis=1)


def in_one_pass(slide: Slide, lattice: Lattice, engine: TorchEngine) -> np.ndarray:
    grid, cells = Grid(lattice, 64, engine.spec.halo, engine.spec.stride), lattice.shrink(engine.spec.output_stride)
    return engine(slide.read(grid.padded.roi, lattice)[None])[0, :, : cells.height, : cells.width]


def in_tiles(slide: Slide, lattice: Lattice, engine: TorchEngine, tile_size: int) -> np.ndarray:
    cells = lattice.shrink(engine.spec.output_stride)
    answer = np.full((len(CLASSES), *cells.shape), np.nan, np.float32)
    grid = Grid(lattice, tile_size, engine.spec.halo, engine.spec.stride)
    for tile, probabilities in predict(slide, grid, grid, engine):
        answer[(slice(None), *tile.target(engine.spec.output_stride).slices())] = probabilities
    return answer


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in SPECS for size in SIZES if SPECS[name].depth > 1 or min(size) < 20], ids=str
)
def test_the_heat_map_is_the_classifier_patch_by_patch(slides: dict[tuple[int, int], Slide], name: str, size: Any) -> None:
    model, classifier = trained(name)
    slide, engine = slides[size], TorchEngine(model, for_slides(classifier))
    lattice = slide.base.at(Mpp.square(1.37 if "odd scale" in name else 1.0))
    truth = patch_by_patch(slide, lattice, model, classifier)
    for found in (in_one_pass(slide, lattice, engine), in_tiles(slide, lattice, engine, 3 * model.stride)):
        assert found.shape == truth.shape
        assert np.abs(found - truth).max() < 1e-5
        assert (found.argmax(0) == truth.argmax(0)).all()


@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].depth > 1])
def test_the_comparison_would_see_a_map_that_is_off(slides: dict[tuple[int, int], Slide], name: str) -> None:
    model, classifier = trained(name)
    slide = slides[SIZES[0]]
    truth = patch_by_patch(slide, slide.base, model, classifier)
    assert np.bincount(truth.argmax(0).ravel(), minlength=3).min() > 0.01 * truth[0].size
    network = convolutional(classifier)
    assert isinstance(network, nn.Sequential)
    for left, value in ((classifier.margin + 1, classifier.glass), (classifier.margin, classifier.glass - 1)):
        right = 2 * classifier.margin - left
        network[0] = nn.ConstantPad2d((left, right, left, right), value)
        wrong = in_one_pass(slide, slide.base, TorchEngine(model, network))
        assert np.abs(wrong - truth).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "channels", "side", "footprint"),
    [
        # 32 -4 /2 = 14; the patch reaches 15 px beyond its cell
        ("32 px every 2", 4, 14, (16, 2, 2)),
        # 40 -4 /2 = 18, -4 /2 = 7, -4 /2 = 1; 16 px
        ("40 px every 8", 16, 1, (16, 8, 8)),
        # 48 -4 /2 = 22, -4 /2 = 9, -4 /2 = 2; 20 px
        ("48 px every 8, odd scale", 16, 2, (24, 8, 8)),
        # 96 -4 /2 = 46, -4 /2 = 21, -4 /2 = 8, -4 /2 = 2; 40 px
        ("96 px every 16", 32, 2, (48, 16, 16)),
    ],
)
def test_sizes_follow_by_hand(name: str, channels: int, side: int, footprint: tuple[int, int, int]) -> None:
    model, classifier = trained(name)
    assert (model.halo, model.stride, model.output_stride) == footprint
    layers = [layer for layer in for_slides(classifier).modules() if isinstance(layer, nn.Conv2d)][2 * model.depth :]
    hidden = 4 * 2**model.depth
    assert [tuple(layer.weight.shape) for layer in layers] == [(hidden, channels, side, side), (3, hidden, 1, 1)]
    dense = [layer for layer in classifier.modules() if isinstance(layer, nn.Linear)]
    for convolution, linear in zip(layers, dense, strict=True):
        assert torch.equal(convolution.weight.flatten(1), linear.weight)
        assert torch.equal(convolution.bias, linear.bias)


def test_converting_leaves_the_classifier_and_the_random_numbers_as_they_were() -> None:
    classifier = build_learner(spec(40, 3))
    before, random = {name: value.clone() for name, value in classifier.state_dict().items()}, torch.get_rng_state()
    network = for_slides(classifier.train())
    assert network.training and torch.equal(random, torch.get_rng_state())
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    network(torch.randn(2, 3, 64, 40))
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_any_other_network_is_the_one_that_learns() -> None:
    learner = build_learner(spec(32, 2, architecture="heatmap"))
    assert for_slides(learner) is learner


def test_one_seed_gives_one_network_in_both_forms() -> None:
    torch.manual_seed(5)
    learner = build_learner(spec(40, 3))
    torch.manual_seed(5)
    network = build_network(spec(40, 3))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in for_slides(learner).state_dict().items())


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"patch_size": 64, "depth": 4}, "patch_size", "80 or more"),
        ({"patch_size": 32, "depth": 3}, "patch_size", "40 or more"),
        ({"mean": (0.5, 0.5, 0.6)}, "mean", "alike in red, green and blue"),
        ({"downsample": "stride"}, "downsample", "null or pool"),
        ({"upsample": "nearest"}, "upsample", "null"),
    ],
)
def test_an_impossible_classifier_is_refused(changes: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught:
        spec(**{"patch_size": 64, "depth": 3, **changes})
    assert f"`{key}`" in caught.value.subject


@pytest.mark.parametrize("depth", range(1, 7))
def test_the_smallest_patch_that_is_named_is_the_smallest(depth: int) -> None:
    step = 2**depth
    works = []
    for patch_size in range(step, 8 * step, step):
        try:
            model = spec(patch_size, depth)
        except NetworkError as error:
            named = int(error.expected.split()[0])
        else:
            works.append(model)
    assert works[0].patch_size == named
    assert build_learner(works[0]).eval()(torch.zeros(1, 3, named, named)).shape == (1, 3)


def trainer(**values: object) -> Trainer:
    settings = TrainingSettings(epochs=5, patches_per_epoch=96, batch_size=16, learning_rate=1e-2, weight_average=0.5)
    torch.manual_seed(0)
    model = spec(32, 2, classes=Classes((CLASSES[0], CLASSES[1])))
    return Trainer(model, build_learner(model), settings.model_copy(update=values), seed=0)


def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A dark square somewhere: class 1 where it covers the centre; nothing is known of the outermost pixels."""
    rng = np.random.default_rng(epoch)
    for _ in range(6):
        images = rng.integers(180, 255, (16, 32, 32, 3), dtype=np.uint8)
        masks = np.zeros((16, 32, 32), np.uint8)
        for image, mask in zip(images, masks, strict=True):
            y, x = rng.integers(0, 20, 2)
            image[y : y + 12, x : x + 12] //= 3
            mask[y : y + 12, x : x + 12] = 1
        masks[:, :4] = IGNORED
        yield images, masks


def test_a_patch_is_learnt_by_the_class_at_its_centre() -> None:
    model = trainer(precision="exact")
    images, masks = next(batches(0))
    with torch.no_grad():
        logits = model.network.train()(normalise(images, model.spec))
    truth = torch.from_numpy(masks[:, 16, 16].astype(int))
    shares = logits.softmax(1)
    dice = [
        1 - 2 * (shares[:, index] * (truth == index)).sum() / (shares[:, index].sum() + (truth == index).sum())
        for index in range(2)
    ]
    expected = functional.cross_entropy(logits, truth) + torch.stack(dice).mean()
    assert model._step(images, masks) == pytest.approx(expected.item(), abs=1e-4)


def test_an_unknown_centre_counts_for_nothing() -> None:
    images, masks = next(batches(0))
    unknown = masks.copy()
    unknown[:, 16, 16] = IGNORED
    model = trainer()
    assert model._step(images, unknown) == 0
    assert all(not parameter.grad.any() for parameter in model.network.parameters())
    unknown = masks.copy()
    unknown[8:, 16, 16] = IGNORED
    others = masks.copy()
    others[8:] = IGNORED
    assert trainer()._step(images, unknown) == trainer()._step(images, others) != trainer()._step(images, masks)


def test_what_is_learnt_shows_in_the_heat_map() -> None:
    model = trainer(epochs=12)
    list(model.fit(batches))
    network = for_slides(model.averaged())
    images, masks = next(batches(99))
    image, mask = np.concatenate(images[:6], axis=1), np.concatenate(masks[:6], axis=1)
    with torch.inference_mode():
        labels = network(normalise(image[None], model.spec))[0].argmax(0).numpy()
    truth = mask[2::4, 2::4]
    assert labels.shape == truth.shape == (8, 48)
    assert (labels == truth)[truth != IGNORED].mean() > 0.9


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fullfield run` makes of three small phantoms with a tiny classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    config = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    manifest = make_cohort(folder / "cohort", seed=3, slides=3, width=801, height=603, mpp=1.0)
    config["output"], config["cohort"]["manifest"] = str(folder / "out"), str(manifest)
    config["network"] = {"architecture": "classifier", "mpp": 4.0, "width": 4, "depth": 2}
    config["tiles"]["patch_size"] = 32
    config["training"] = {"epochs": 2, "patches_per_epoch": 64, "batch_size": 16, "weight_average": 0.5}
    config["segmentation"], config["cluster"] = {"tile_size": 64}, {"workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "workflows", "run", str(folder / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return folder


def test_a_classifier_is_trained_and_segments_slides(results: Path) -> None:
    from safetensors.torch import load_file

    from pipeline.checkpoint import load_spec

    model = load_spec(results / "out" / "model")
    assert (model.architecture, model.stride, model.halo, model.output_stride) == ("classifier", 4, 16, 4)
    classifier = build_learner(model)
    weights = load_file(results / "out" / "model" / "weights.safetensors")
    shapes = {name: value.shape for name, value in classifier.state_dict().items()}
    classifier.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()})
    slide = open_slide(results / "cohort" / "phantom-03.tiff")
    lattice = slide.base.at(Mpp.square(4.0))
    assert isinstance(classifier, Classifier)
    truth = patch_by_patch(slide, lattice, model, classifier.eval()).argmax(0)
    canvas = open_canvas(results / "out" / "slides" / "phantom-03" / "segmentation.ome.zarr")
    assert canvas.lattice.mpp == Mpp.square(16.0)
    labels = canvas.read_labels(canvas.lattice.roi)
    assert labels.shape == truth.shape == (-(-151 // 4), -(-201 // 4))
    assert (labels != IGNORED).mean() > 0.5 and len(np.unique(labels[labels != IGNORED])) > 1
    assert (labels == truth)[labels != IGNORED].all()
