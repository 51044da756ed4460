"""Transposed convolutions as plain ones against torch's own, and that no window changes their order of additions."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("openvino")

from pipeline.openvino_engine import beside_int8, half
from pipeline.openvino_graph import import_openvino
from pipeline.upsampling import make_convolutions, phases


def kinds(model: object) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]  # type: ignore[attr-defined]


def run(model: object, windows: np.ndarray, precision: str = "f32") -> np.ndarray:
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 2}
    return np.asarray(import_openvino().Core().compile_model(model, "CPU", settings)(windows)[0])


def converted(layer: torch.nn.Module, channels: int) -> object:
    openvino = import_openvino()
    model = openvino.convert_model(layer, example_input=torch.zeros(1, channels, 8, 8))
    model.reshape([-1, channels, -1, -1])
    return model


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_phases_say_which_input_meets_which_weight(stride: int, padding: int, more: int) -> None:
    """Along one side: an input pixel i is spread over the output pixels i * stride - padding + tap."""
    kernel = stride + 2 * padding - more
    assume(kernel > 0)
    truth = {(i, tap, i * stride - padding + tap) for i in range(-9, 10) for tap in range(kernel)}
    found = phases(kernel, padding, more, stride)
    assert phases(kernel, padding, more + 1, stride) is None
    if found is None:
        reads = [{i for i, _, place in truth if place == phase} or {1} for phase in range(stride)]
        assert any(min(read) > 0 or max(read) < 0 for read in reads)
        return
    met = {
        (q + phase.first + place, tap, stride * q + number)
        for q in range(-5, 6)
        for number, phase in enumerate(found)
        for place, tap in enumerate(phase.taps)
    }
    assert met == {item for item in truth if -5 * stride <= item[2] < 6 * stride}


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more"),
    [
        (3, 2, 1, 1),
        (2, 2, 0, 0),
        (4, 2, 1, 0),
        (3, 3, 0, 0),
        (6, 4, 1, 0),
        (5, 2, 2, 1),
        (3, 1, 1, 0),
        ((3, 2), 2, (1, 0), (1, 0)),
    ],
)
@pytest.mark.parametrize("outputs", [1, 3, 32])
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
    make_convolutions(model, every=True)
    assert "ConvolutionBackpropData" not in kinds(model) and "DepthToSpace" in kinds(model)
    assert kinds(model).count("Convolution") == (1 if outputs < 16 else stride**2)
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
        torch.nn.ConvTranspose2d(8, 3, 3, 2),  # twice as many pixels and one
        torch.nn.ConvTranspose2d(8, 3, 1, 2, 0, 1),  # of four phases three read nothing
        torch.nn.ConvTranspose2d(8, 2, 3, 2, 1, 1, groups=2),
        torch.nn.ConvTranspose2d(8, 3, 3, (2, 3), (1, 0), (1, 0)),
        torch.nn.ConvTranspose2d(8, 3, 2, 2, 1, dilation=3),
    ],
    ids=["odd", "empty", "groups", "strides", "dilation"],
)
def test_others_stay_as_they_are(layer: torch.nn.ConvTranspose2d) -> None:
    model = converted(layer.eval(), 8)
    before = kinds(model)
    make_convolutions(model, every=True)
    assert kinds(model) == before


@pytest.mark.parametrize(("outputs", "left"), [(3, 0), (32, 1)])
def test_where_it_is_for_speed_those_that_would_be_more_work_stay(outputs: int, left: int) -> None:
    model = converted(torch.nn.ConvTranspose2d(8, outputs, 3, 2, 1, 1).eval(), 8)
    make_convolutions(model, every=False)
    assert kinds(model).count("ConvolutionBackpropData") == left


def test_in_half_precision_a_window_has_the_bits_of_the_whole() -> None:
    """Of sizes and threads with which a transposed convolution's differ on some processors."""
    if beside_int8() != half():
        pytest.skip("a processor without half precision")
    torch.manual_seed(1)
    model = converted(torch.nn.ConvTranspose2d(192, 32, 3, 2, 1, 1).eval(), 192)
    make_convolutions(model, every=True)
    values = torch.randn(1, 192, 97, 125).numpy()
    whole = run(model, values, half())
    for rows, columns in ((32, 32), (28, 120), (64, 64)):
        window = run(model, np.ascontiguousarray(values[:, :, :rows, :columns]), half())
        inside = (..., slice(2 * rows - 2), slice(2 * columns - 2))
        assert (window[inside] == whole[inside]).all()
