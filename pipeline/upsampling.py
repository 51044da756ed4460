"""Transposed convolutions, which learned upsampling is, in the forms that OpenVINO computes fast.

    to few channels   a part of each vector would stay empty: a convolution to stride^2 times as many channels, whose values
                      are then laid side by side, gives the same numbers
    in int8           of values with a zero point it computes them in fp32: they are quantised without one

Both change a graph in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from openvino import Input, Model, Node

_TRANSPOSED = "ConvolutionBackpropData"
_VECTOR = 16  # floats of AVX-512; half as many of AVX2, where both ways take about as long
_LEVELS = 256


def make_convolutions(model: Model) -> None:
    """Make convolutions of those transposed ones that take less work so, and upsample by their stride exactly."""
    from openvino.utils import replace_node

    for node in _transposed(model):
        if _fits(node) and (made := _convolution(node)) is not None:
            replace_node(node, made)


def drop_zero_points(model: Model) -> None:
    """Of a quantised graph: what transposed convolutions read is quantised with one scale, symmetric about 0."""
    from openvino import opset13

    for node in _transposed(model):
        inputs = _quantised(node.input(0))
        ranges = [_range(item) for item in inputs]
        if all(low >= 0 for low, _ in ranges):
            continue
        reach = max(max(-low, high * _LEVELS / (_LEVELS - 2)) for low, high in ranges)
        limits = [opset13.constant(np.float32(limit)) for limit in (-reach, reach * (_LEVELS - 2) / _LEVELS)]
        for item in inputs:
            value = item.get_source_output().get_node().input_value(0)
            item.replace_source_output(opset13.fake_quantize(value, *limits, *limits, _LEVELS).output(0))


def _transposed(model: Model) -> list[Node]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == _TRANSPOSED]


def _fits(node: Node) -> bool:
    """Whether it gives `stride` pixels for each, the same along both sides, with weights that are known."""
    facts, weights = node.get_attributes(), node.input_value(1).get_node()
    plain = facts["auto_pad"] == "explicit" and set(facts["dilations"]) == {1} and len(set(facts["strides"])) == 1
    if not plain or node.get_input_size() != 2 or weights.get_type_name() != "Constant":
        return False
    names = ("strides", "pads_begin", "pads_end", "output_padding")
    sides = zip(weights.get_output_shape(0)[2:], *(facts[name] for name in names), strict=True)
    return all(kernel + more == stride + before + after for kernel, stride, before, after, more in sides)


def _convolution(node: Node) -> Node | None:
    """The same as a convolution, and its values laid side by side; None where that is more work.

    An output pixel `stride * q + phase` is the sum over d of the weight at `phase + padding - stride * d` times the input
    pixel q + d: for each phase an output channel of a convolution.
    """
    from openvino import opset13

    weights, facts = node.input_value(1).get_node().data, node.get_attributes()
    stride, paddings = facts["strides"][0], facts["pads_begin"]
    inputs, outputs, *kernel = weights.shape
    first, last = zip(*(_offsets(*side, stride) for side in zip(kernel, paddings, strict=True)), strict=True)
    shape = [high - low + 1 for low, high in zip(first, last, strict=True)]
    if np.prod(shape) * _vectors(stride**2 * outputs) >= np.prod(kernel) * _vectors(outputs):
        return None
    wide = np.zeros((outputs, stride, stride, inputs, *shape), np.float32)
    for phase in np.ndindex(stride, stride):
        for place in np.ndindex(*shape):
            tap = [phase[i] + paddings[i] - stride * (first[i] + place[i]) for i in range(2)]
            if 0 <= tap[0] < kernel[0] and 0 <= tap[1] < kernel[1]:
                wide[:, *phase, :, *place] = weights[:, :, *tap].T
    flat = opset13.constant(wide.reshape(-1, inputs, *shape))
    before = [-low for low in first]
    answer = opset13.convolution(node.input_value(0), flat, [1, 1], before, list(last), [1, 1])
    return opset13.depth_to_space(answer, "depth_first", stride)


def _offsets(kernel: int, padding: int, stride: int) -> tuple[int, int]:
    """From which to which input pixel, counted from its own, an output pixel looks along one side."""
    return -((kernel - 1 - padding) // stride), (stride - 1 + padding) // stride


def _vectors(channels: int) -> int:
    return -(-channels // _VECTOR)


def _quantised(end: Input) -> list[Input]:
    """Where the value at an input comes quantised, or each part that it is joined of; empty where it does not."""
    source = end.get_source_output().get_node()
    if source.get_type_name() == "FakeQuantize":
        return [end]
    parts = [_quantised(part) for part in source.inputs()] if source.get_type_name() == "Concat" else []
    return [item for part in parts for item in part] if all(parts) else []


def _range(end: Input) -> tuple[float, float]:
    """The least and the largest value that the quantised one at an input may have."""
    low, high = (end.get_source_output().get_node().input_value(index).get_node().data for index in (1, 2))
    return float(low.min()), float(high.max())
