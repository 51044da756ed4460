"""Transposed convolutions, which learned upsampling is, as plain ones.

Along one side, output pixel `stride * q + phase` is a sum over input pixels around q: the taps of the kernel that meet them
depend on the phase alone. So each phase is a convolution, and their answers are laid side by side.

    input --+-- convolution of phase 0 --+
            +-- convolution of phase 1 --+-- side by side --> output

    to few channels        one convolution for all phases fills vectors that would stay part empty
    in half precision      OpenVINO adds up a transposed convolution in an order that depends on the window's size and the
                           number of threads, which shows at 8 bits; plain ones never were seen to (`fullfield verify` tells)
    in int8                it computes a transposed one of values with a zero point in larger numbers
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from openvino import Model, Node

_Kernel = tuple[np.ndarray, list[int], list[int]]
"""(out, in, rows, columns), and the padding that it needs before and after, rows first."""

_TRANSPOSED = "ConvolutionBackpropData"
_VECTOR = 16  # floats of AVX-512; half as many of AVX2, where both ways take about as long


class Phase(NamedTuple):
    """What one phase of the output reads along one side: input pixels from q + `first` on, one for each of the taps."""

    first: int
    taps: range

    @property
    def last(self) -> int:
        """The last input pixel, counted from q."""
        return self.first + len(self.taps) - 1


def phases(kernel: int, padding: int, output_padding: int, stride: int) -> list[Phase] | None:
    """The phases of a transposed convolution along one side; all sizes in pixels.

    None where it does not give `stride` pixels for each, or where a phase does not reach q itself.
    """
    if kernel + output_padding != stride + 2 * padding:
        return None
    found = [_phase(kernel, padding + phase, stride) for phase in range(stride)]
    return found if all(phase.taps and phase.first <= 0 <= phase.last for phase in found) else None


def _phase(kernel: int, shift: int, stride: int) -> Phase:
    tap = kernel - 1 - (kernel - 1 - shift) % stride  # the last one that falls on an input pixel
    return Phase((shift - tap) // stride, range(tap, -1, -stride))


def make_convolutions(model: Model, every: bool) -> None:
    """Put convolutions in the place of a graph's transposed ones: of `every` one that has as many phases along both sides,
    or of those alone that are less work as one convolution.
    """
    from openvino.utils import replace_node

    for node in model.get_ordered_ops():
        if node.get_type_name() == _TRANSPOSED and (sides := _sides(node)) and (made := _convolutions(node, *sides, every)):
            replace_node(node, made)


def _sides(node: Node) -> tuple[list[Phase], list[Phase]] | None:
    """Its phases along rows and along columns; None where it has none, other ones, or weights that are worked out."""
    facts, weights = node.get_attributes(), node.input_value(1).get_node()
    plain = facts["auto_pad"] == "explicit" and set(facts["dilations"]) == {1} and len(set(facts["strides"])) == 1
    known = node.get_input_size() == 2 and weights.get_type_name() == "Constant"
    if not plain or not known or facts["pads_begin"] != facts["pads_end"]:
        return None
    sizes = (weights.data.shape[2:], *(facts[name] for name in ("pads_begin", "output_padding", "strides")))
    rows, columns = itertools.starmap(phases, zip(*sizes, strict=True))
    return (rows, columns) if rows and columns else None


def _convolutions(node: Node, rows: list[Phase], columns: list[Phase], every: bool) -> Node | None:
    """One convolution for all phases where that is less work; else one for each, or None if not `every` one is wanted."""
    from openvino import opset13

    weights = node.input_value(1).get_node().data
    kernels = [_kernel(weights, [row], [column]) for row, column in itertools.product(rows, columns)]
    joined = [_kernel(weights, rows, columns)]
    if _work(joined) < _work(kernels):
        kernels = joined
    elif not every:
        return None
    answers = [opset13.convolution(node.input_value(0), kernel, [1, 1], *around, [1, 1]) for kernel, *around in kernels]
    beside = opset13.concat(answers, 1) if len(answers) > 1 else answers[0]
    return opset13.depth_to_space(beside, "blocks_first", len(rows))


def _kernel(weights: np.ndarray, rows: list[Phase], columns: list[Phase]) -> _Kernel:
    """The kernel of a convolution that answers for these phases, one after the other."""
    before = [-min(phase.first for phase in side) for side in (rows, columns)]
    after = [max(phase.last for phase in side) for side in (rows, columns)]
    size = [first + 1 + last for first, last in zip(before, after, strict=True)]
    kernel = np.zeros((len(rows), len(columns), weights.shape[1], weights.shape[0], *size), np.float32)
    for (y, row), (x, column) in itertools.product(enumerate(rows), enumerate(columns)):
        part = weights[:, :, row.taps][..., column.taps].swapaxes(0, 1)
        top, left = before[0] + row.first, before[1] + column.first
        kernel[y, x, :, :, top : top + len(row.taps), left : left + len(column.taps)] = part
    return kernel.reshape(-1, *kernel.shape[3:]), before, after


def _work(kernels: list[_Kernel]) -> int:
    """What convolutions with such kernels take, in vectors of output channels for each of a kernel's weights."""
    return sum(-(-len(kernel) // _VECTOR) * kernel[0].size for kernel, _, _ in kernels)
