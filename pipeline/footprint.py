"""How far a network looks, found by asking the network itself.

NaN spreads through every convolution, pooling and activation, whatever the weights. So rows of NaN go in, and the rows that
come out as NaN are those that depend on them:

    in    . . . . . . N N . . . . . .     N: one stride of rows, so that every phase is asked at once
    out   . . . N N N N N N N N . . .     the halo is the longer of the two overhangs, in whole strides

Only one axis counts at a time, so the probe is a narrow strip and costs little.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.errors import NetworkError
from pipeline.network import ModelSpec, activation

_CHANNELS = 3  # of a slide
_LENGTHS = (256, 512, 1024, 1536, 2048, 3072, 4096)  # pixels: of the strips, tried in turn
_WIDTHS = (8, 16, 32, 64)  # pixels: across the strips; the first that the network takes
_STRIDES = (1, 2, 4, 8, 16, 32, 64)
_BLOCK = _STRIDES[-1]
_TOLERANCE = 1e-5
_SHOWN = 6  # layers that an error names


@dataclass(frozen=True)
class Footprint:
    """What exact tiling needs to know of a network, in pixels of its input.

    `stride`: an image shifted by it gives the answer shifted. `output_stride`: pixels to one value of the answer. `halo`:
    the answer for a write roi, with edges that are multiples of `stride`, depends on nothing further from it than this; a
    multiple of `stride`.
    """

    halo: int
    stride: int
    output_stride: int


def measure(network: nn.Module) -> Footprint:
    """The footprint of a network in evaluation, on the device where it is.

    Weights, batch statistics, training mode and torch's random numbers stay as they were. Raises NetworkError for a network
    that is not local, naming the layers, and for one that exact tiling cannot use for another reason.
    """
    with _evaluation(network):
        width, output_stride = _scale(network)
        axes = [_Axis(network, width, dim) for dim in (2, 3)]
        length, stride = _LENGTHS[0], output_stride
        for axis in axes:
            length = _length(axis, length)
        for axis in axes:
            stride = _stride(axis, length, stride)
        reach = max(_reach(axis, length, stride) for axis in axes)
    return Footprint(-(-reach // stride) * stride, stride, output_stride)


def assert_exact(network: nn.Module, footprint: Footprint) -> None:
    """Compare tiles with one forward pass over the whole: at its start, inside with a window that begins an odd number of
    strides from the start, and at its end.

    This also sees what NaN cannot: layers that replace NaN, that count pixels from the border, or that scale by the image's
    size. The image is noise, and a copy of the network with batch statistics to match, as layers far down would else hardly
    be felt. Raises NetworkError where a probability differs by more than 1e-5.
    """
    halo, stride, scale = footprint.halo, footprint.stride, footprint.output_stride
    write, inside = 2 * stride, halo + 3 * stride
    length = inside + write + halo + 3 * stride
    differences = []
    with _evaluation(network):
        for dim in (2, 3):
            axis = _matched(_Axis(network, max(stride, _WIDTHS[1]), dim), length)
            strip = axis.noise(length)
            whole = activation(axis.run(strip)[None])[0]
            for start in (0, inside, length - write):
                first, last = max(start - halo, 0), min(start + write + halo, length)
                tile = activation(axis.run(strip[:, first:last])[None])[0, :, (start - first) // scale :]
                truth = whole[:, start // scale : (start + write) // scale]
                differences.append((tile[:, : write // scale] - truth).abs().max())
    worst = float(torch.stack(differences).max())
    if not worst <= _TOLERANCE:
        found = f"tiles that differ from one forward pass by {worst:.2g} in probability"
        raise _refused(network, found, "layers that depend on the image's size or on a pixel's place in it")


def with_footprint(spec: ModelSpec, network: nn.Module) -> ModelSpec:
    """The spec with the halo, stride and output stride of its network, measured and cross-checked. Raises NetworkError.

    Of a network whose spec says that it is not local there is nothing to measure: it takes multiples of its halvings.
    """
    if spec.halo is None:
        return replace(spec, stride=2**spec.depth)
    footprint = measure(network)
    assert_exact(network, footprint)
    return replace(spec, halo=footprint.halo, stride=footprint.stride, output_stride=footprint.output_stride)


@dataclass(frozen=True)
class _Axis:
    """One axis of a network: strips run along it, and have it as their first."""

    network: nn.Module
    width: int
    dim: int  # 2: down the rows, 3: along the columns

    def run(self, strip: torch.Tensor) -> torch.Tensor:
        """Logits (C, length / output_stride, ...) of a strip (channels, length, width)."""
        image = strip[None] if self.dim == 2 else strip[None].transpose(2, 3).contiguous()
        try:
            logits = self.network(image)
        except (RuntimeError, ValueError) as error:
            found = f"no answer for an image of {image.shape[2]} x {image.shape[3]} pixels ({error})"
            raise _refused(self.network, found, "layers that are tied to one size of image") from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4:
            raise _refused(self.network, "an answer that is no (N, C, H, W) tensor", "other outputs")
        return logits[0] if self.dim == 2 else logits[0].transpose(1, 2)

    def noise(self, length: int) -> torch.Tensor:
        """A strip of noise, the same at every call."""
        noise = torch.randn((_CHANNELS, length, self.width), generator=torch.Generator().manual_seed(0))
        return noise.to(next(self.network.parameters()))

    def spread(self, length: int, start: int, stop: int) -> tuple[int, int]:
        """First and last (exclusive) row of the answer, in pixels of the input, that sees any of the rows start to stop."""
        strip = self.noise(length)
        strip[:, start:stop] = torch.nan
        logits = self.run(strip)
        rows = logits.isnan().any(dim=2).any(dim=0).nonzero().flatten().tolist()
        scale = length // logits.shape[1]
        return (rows[0] * scale, (rows[-1] + 1) * scale) if rows else (start, stop)


def _scale(network: nn.Module) -> tuple[int, int]:
    """The width of the strips to probe with, and the output stride."""
    for width in _WIDTHS:
        try:
            return width, _output_stride(_Axis(network, width, 2))
        except NetworkError as error:
            refusal = error
    raise refusal


def _output_stride(axis: _Axis) -> int:
    length = _LENGTHS[0]
    logits = axis.run(axis.noise(length))
    if not logits.isfinite().all():
        raise _refused(axis.network, "an answer that is not finite", "broken weights")
    _, rows, columns = logits.shape
    scale = length // max(rows, 1)
    if (rows * scale, columns * scale) != (length, axis.width):
        found = f"an answer of {rows} x {columns} for {length} x {axis.width} pixels"
        raise _refused(axis.network, found, "unpadded convolutions and strides that are no power of two")
    return scale


def _length(axis: _Axis, least: int) -> int:
    """The length of a strip that a network does not reach across, from its middle."""
    for length in _LENGTHS[_LENGTHS.index(least) :]:
        first, last = axis.spread(length, length // 2, length // 2 + _BLOCK)
        if first >= _BLOCK and last <= length - _BLOCK:
            return length
    layers = _mixing_layers(axis)
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    found = f"layers that mix pixels from all over the image: {', '.join(layers[:_SHOWN])}{more}"
    raise _refused(axis.network, found, "instance, group or layer norm, global pooling and attention")


def _stride(axis: _Axis, length: int, least: int) -> int:
    middle = length // 2
    first, last = axis.spread(length, middle, middle + 1)

    def shifts(stride: int) -> bool:
        return axis.spread(length, middle + stride, middle + stride + 1) == (first + stride, last + stride)

    # Multiples of the stride shift as well, so that a bisection finds it.
    candidates = [stride for stride in _STRIDES if stride % least == 0]
    place = bisect_left(candidates, True, key=shifts)
    if place == len(candidates):
        raise _refused(axis.network, "no stride", f"strides that are no power of two up to {_STRIDES[-1]}")
    return candidates[place]


def _reach(axis: _Axis, length: int, stride: int) -> int:
    start = length // 2
    first, last = axis.spread(length, start, start + stride)
    return max(start - first, last - start - stride, 0)


def _mixing_layers(axis: _Axis) -> list[str]:
    """The layers that got NaN in the middle only and gave it near the edge, as `path (Class)`.

    What they gave is repaired, so that the layers after them, and those around them, are judged by their own doing.
    """
    length, found = _LENGTHS[-1], list[str]()

    def watch(name: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
            inputs = [value for value in (*args, *kwargs.values()) if _is_image(value)]
            if not _is_image(output) or not inputs or not _near_edge(output, axis.dim):
                return None
            if any(_near_edge(value, axis.dim) for value in inputs):
                return None
            found.append(f"{name or 'the network'} ({type(module).__name__})")
            return _repaired(output, axis.dim)

        return hook

    named = list(axis.network.named_modules())
    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in named]
    try:
        axis.spread(length, length // 2, length // 2 + _BLOCK)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_image(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4


def _near_edge(image: torch.Tensor, dim: int) -> bool:
    margin = max(image.shape[dim] // 32, 1)
    before, after = image.narrow(dim, 0, margin), image.narrow(dim, image.shape[dim] - margin, margin)
    return bool(before.isnan().any() or after.isnan().any())


def _repaired(image: torch.Tensor, dim: int) -> torch.Tensor:
    clean = image.nan_to_num(0.0)
    if clean.shape[dim] > 2:
        clean.select(dim, clean.shape[dim] // 2).fill_(torch.nan)
    return clean


def _matched(axis: _Axis, length: int) -> _Axis:
    """The axis of a copy of its network, whose batch statistics are those of noise."""
    network = deepcopy(axis.network)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    matched = replace(axis, network=network)
    matched.run(matched.noise(length))
    network.eval()
    return matched


@contextmanager
def _evaluation(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _refused(network: nn.Module, found: str, cause: str) -> NetworkError:
    expected = "a network whose answer depends on a pixel's surroundings alone, in the same way everywhere"
    remedy = f"Build it without {cause}; convolutions, pooling and batch norm are fine."
    return NetworkError(type(network).__name__, found, expected, remedy)
