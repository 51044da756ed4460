"""Transposed convolutions in another form against torch's own, and those of int8 graphs without a zero point."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")

from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.footprint import with_footprint
from pipeline.network import ModelSpec
from pipeline.openvino_graph import export, import_openvino, quantise, read_graph
from pipeline.phantom import render
from pipeline.upsampling import drop_zero_points, make_convolutions

IMAGE = render(5, 256, 128, 1.0, spread=3)[0]


def kinds(model: object) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]  # type: ignore[attr-defined]


def run(model: object, windows: np.ndarray) -> np.ndarray:
    compiled = import_openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(windows)[0])


def converted(layer: torch.nn.Module, channels: int) -> object:
    openvino = import_openvino()
    model = openvino.convert_model(layer, example_input=torch.zeros(1, channels, 8, 8))
    model.reshape([-1, channels, -1, -1])
    return model


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more"),
    [(3, 2, 1, 1), (2, 2, 0, 0), (4, 2, 1, 0), (3, 3, 0, 0), (6, 4, 1, 0), ((3, 2), 2, (1, 0), (1, 0)), (5, 2, 2, 1)],
)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_convolution_in_its_place_gives_the_same(
    kernel: int | tuple[int, int],
    stride: int,
    padding: int | tuple[int, int],
    more: int | tuple[int, int],
    outputs: int,
) -> None:
    torch.manual_seed(1)
    layer = torch.nn.ConvTranspose2d(5, outputs, kernel, stride, padding, more).eval()
    model = converted(layer, 5)
    make_convolutions(model)
    assert "ConvolutionBackpropData" not in kinds(model) and "DepthToSpace" in kinds(model)
    for shape in ((2, 5, 9, 4), (1, 5, 1, 1), (1, 5, 2, 13)):
        values = torch.randn(shape)
        with torch.no_grad():
            truth = layer(values).numpy()
        answer = run(model, values.numpy())
        assert answer.shape == truth.shape
        assert np.abs(answer - truth).max() < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.ConvTranspose2d(8, 32, 3, 2, 1, 1),  # more work as a convolution
        torch.nn.ConvTranspose2d(8, 3, 3, 2),  # twice as many pixels and one
        torch.nn.ConvTranspose2d(8, 2, 3, 2, 1, 1, groups=2),
        torch.nn.ConvTranspose2d(8, 3, 3, (2, 3), (1, 0), (1, 0)),
        torch.nn.ConvTranspose2d(8, 3, 2, 2, 1, dilation=3),
    ],
    ids=["wide", "odd", "groups", "strides", "dilation"],
)
def test_others_stay_as_they_are(layer: torch.nn.ConvTranspose2d) -> None:
    model = converted(layer.eval(), 8)
    before = kinds(model)
    make_convolutions(model)
    assert kinds(model) == before


def test_what_int8_upsampling_reads_is_symmetric_and_all_else_as_it_was(tmp_path: Path) -> None:
    classes = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))
    spec = ModelSpec(architecture="unet", classes=classes, mpp=1.0, patch_size=32, width=16, depth=3)
    torch.manual_seed(2)
    network = build_network(spec).eval()
    graph = export(with_footprint(spec, network), network, tmp_path / "graph")
    quantised = quantise(graph, [IMAGE[:64, :64], IMAGE[64:, 100:164]], tmp_path / "int8")
    core = import_openvino().Core()
    before, after = read_graph(core, quantised), read_graph(core, quantised)
    drop_zero_points(after)
    upsampled = [node for node in after.get_ordered_ops() if node.get_type_name() == "ConvolutionBackpropData"]
    assert upsampled
    for node in upsampled:
        joined = node.input_value(0).get_node()
        parts = [value.get_node() for value in joined.input_values()]
        ranges = {tuple(float(part.input_value(index).get_node().data) for index in (1, 2)) for part in parts}
        assert [part.get_type_name() for part in parts] == ["FakeQuantize"] * 2
        ((low, high),) = ranges
        assert low < 0 < high and high == pytest.approx(-low * 127 / 128)
    assert set(kinds(before)) == set(kinds(after))
    window = IMAGE[None, :128, :192]
    answers = [run(model, window) for model in (read_graph(core, graph), before, after)]
    far = [np.abs(answer - answers[0]).mean() for answer in answers[1:]]
    assert 0 < far[1] < 1.5 * far[0]
    drop_zero_points(exact := read_graph(core, graph))
    assert kinds(exact) == kinds(read_graph(core, graph))
