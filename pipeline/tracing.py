"""Finds the graph of a network, by watching it work.

The network runs once on a small image, while every operation that reaches torch is written down. That takes a fraction of a
second, where torch.export takes seconds, and more to be imported. What asks for a pixel's value, as a branch would, is an
operation too, which no graph has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import NetworkError
from pipeline.graph import IMAGE, OPERATIONS, Graph, GraphNetwork, Node, described, numbered
from pipeline.network import ModelSpec

Values = dict[str, Any]
Call = tuple[str, list[Any], list[Any], Values]
"""An operation's name, its values, its weights and its settings."""

_TOLERANCE = 1e-4  # of the largest answer


def trace(network: nn.Module, spec: ModelSpec) -> Graph:
    """The graph of what a network does in evaluation; the network itself is left as it is.

    Raises NetworkError for an operation that no graph has, or that is tied to the image's size, and names it.
    """
    copy, step = deepcopy(network).cpu().eval(), example_step(spec)
    weights = copy.state_dict(keep_vars=True)
    image = _noise(2 * step, 3 * step)
    recorder = _Recorder(type(network).__name__, image, {id(value): name for name, value in weights.items()})
    try:
        with torch.no_grad(), recorder:
            answer = copy(image)
    except (RuntimeError, ValueError) as error:
        raise _refused(recorder.subject, f"a forward pass that fails ({error})") from error
    output = recorder.values.get(id(answer), IMAGE)
    if output == IMAGE:
        raise _refused(recorder.subject, "an answer that is no value of the image's")
    graph = Graph(tuple(recorder.nodes), described(weights), output)
    _check(copy, GraphNetwork(graph, weights), step, recorder.subject)
    return graph


def example_step(spec: ModelSpec) -> int:
    """Pixels of which the sides of any image must be multiples, for a spec whose stride may not be measured yet."""
    return math.lcm(spec.stride, 2**spec.depth)


def _check(network: nn.Module, traced: GraphNetwork, step: int, subject: str) -> None:
    """Run both on noise of other sides than the traced: what Python worked out from the size shows as a difference."""
    noise = _noise(3 * step, 2 * step)
    with torch.no_grad():
        whole = network(noise)
        try:
            found = traced(noise)
        except RuntimeError as error:
            raise _refused(subject, f"a graph that fails on another size ({error})") from error
    tolerance = _TOLERANCE * float(whole.abs().nan_to_num().max())
    if found.shape != whole.shape or not torch.allclose(found, whole, rtol=0, atol=tolerance, equal_nan=True):
        raise _refused(subject, "numbers that follow from the image's size")


def _noise(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what is done to the image.

    `values` names each tensor that follows from the image, by its identity, and `weights` each weight. An operation done in
    place gives its tensor a new name, so that whoever takes it later takes the new value.
    """

    def __init__(self, subject: str, image: torch.Tensor, weights: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.subject, self.weights = subject, weights
        self.values, self.nodes = {id(image): IMAGE}, list[Node]()
        self._zeros: dict[int, torch.Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._alive: list[object] = [image]  # an identity is only good while its tensor lives

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to keep it out of here, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive.append(result)
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
        self._record(str(func), {**defaults, **given, **(kwargs or {})}, result)
        return result

    def _record(self, name: str, given: Values, result: Any) -> None:
        tensors = [part for value in given.values() for part in (value if isinstance(value, list | tuple) else [value])]
        touched = {id(part) for part in tensors if isinstance(part, torch.Tensor)}
        if not touched & {*self.values, *self.weights}:
            if name == "aten.zeros.default" or (name == "aten.detach.default" and id(given["self"]) in self._zeros):
                self._zeros[id(result)] = result
            return
        given["zeros"] = self._zeros
        first = result[0] if isinstance(result, tuple) else result  # pooling and batch norm give more, which nobody reads
        if name in _SAME and _SAME[name](given):
            names = self.values if id(given["self"]) in self.values else self.weights
            names[id(first)] = names[id(given["self"])]
            return
        call = _CALLS[name](given) if name in _CALLS else None
        if call is None:
            raise _refused(self.subject, f"the operation {name}, or its settings,")
        self._append(name, call, first)

    def _append(self, name: str, call: Call, result: torch.Tensor) -> None:
        op, values, weights, settings = call
        if any(id(value) not in self.values for value in values):
            raise _refused(self.subject, f"the operation {name} on what does not follow from the image,")
        if any(weight is not None and id(weight) not in self.weights for weight in weights):
            raise _refused(self.subject, f"the operation {name} with weights that are worked out,")
        inputs = tuple(self.values[id(value)] for value in values)
        names = tuple(None if weight is None else self.weights[id(weight)] for weight in weights)
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        node = Node(numbered(op, self._counts[op]), op, inputs, names, tuples)
        if fault := node.fault():
            raise _refused(self.subject, f"the operation {name} with {fault}")
        self._counts[op] += 1
        self.nodes.append(node)
        self.values[id(result)] = node.name


def _convolution(given: Values) -> Call:
    settings = {key: given[key] for key in ("stride", "padding", "dilation", "groups")}
    if given["transposed"]:
        settings["output_padding"] = given["output_padding"]
    op = "conv_transpose2d" if given["transposed"] else "conv2d"
    return op, [given["input"]], [given["weight"], given["bias"]], settings


def _batch_norm(given: Values) -> Call | None:
    roles = ("running_mean", "running_var", "weight", "bias")
    return None if given["training"] else ("batch_norm", [given["input"]], [given[r] for r in roles], {"eps": given["eps"]})


def _pool(op: str, *more: str) -> Callable[[Values], Call | None]:
    def call(given: Values) -> Call | None:
        if given.get("divisor_override") is not None:
            return None
        settings = {key: _both(given[key]) for key in ("kernel_size", "padding")}
        settings["stride"] = _both(given["stride"]) or settings["kernel_size"]
        flags = {key: _both(given[key]) if key == "dilation" else given[key] for key in ("ceil_mode", *more)}
        return op, [given["self"]], [], {**settings, **flags}

    return call


def _upsample(given: Values) -> Call | None:
    """By factors; an upsampling to a size has none."""
    factors = [given["scales_h"], given["scales_w"]]
    return None if None in factors else ("upsample_nearest2d", [given["self"]], [], {"scale_factor": factors})


def _cat(given: Values) -> Call | None:
    """Along the channels; zeros of the image's own size are channels of padding."""
    parts, zeros = given["tensors"], given["zeros"]
    padded = [part for part in parts[1:] if id(part) in zeros]
    if given["dim"] not in (1, -3):
        return None
    if len(padded) == 1 and len(parts) == 2:
        return "pad", [parts[0]], [], {"pad": [0, 0, 0, 0, 0, padded[0].shape[1]], "value": 0.0}
    return "cat", list(parts), [], {}


def _arithmetic(op: str) -> Callable[[Values], Call | None]:
    def call(given: Values) -> Call | None:
        plain = isinstance(given["other"], torch.Tensor) and given.get("alpha", 1) == 1
        return (op, [given["self"], given["other"]], [], {}) if plain else None

    return call


def _pad(given: Values) -> Call:
    return "pad", [given["self"]], [], {"pad": given["pad"], "value": float(given["value"])}


def _relu(given: Values) -> Call:
    return "relu", [given["self"]], [], {"inplace": False}


def _leaky_relu(given: Values) -> Call:
    return "leaky_relu", [given["self"]], [], {"negative_slope": given["negative_slope"], "inplace": False}


def _prelu(given: Values) -> Call:
    return "prelu", [given["self"]], [given["weight"]], {}


def _sigmoid(given: Values) -> Call:
    return "sigmoid", [given["self"]], [], {}


def _both(value: list[int]) -> list[int]:
    return value * 2 if len(value) == 1 else value


def _is_column(given: Values) -> bool:
    """A weight laid along the channels, as PReLU does with its own."""
    return isinstance(given["self"], nn.Parameter | torch.Tensor) and given["self"].ndim == 1


def _refused(subject: str, found: str) -> NetworkError:
    expected = f"operations that know no image size: {', '.join(OPERATIONS)}"
    return NetworkError(subject, found, expected, "Build the network of these.")


_CALLS: dict[str, Callable[[Values], Call | None]] = {
    "aten.convolution.default": _convolution,
    "aten.native_batch_norm.default": _batch_norm,
    "aten.relu.default": _relu,
    "aten.relu_.default": _relu,
    "aten.leaky_relu.default": _leaky_relu,
    "aten.leaky_relu_.default": _leaky_relu,
    "aten._prelu_kernel.default": _prelu,
    "aten.sigmoid.default": _sigmoid,
    "aten.sigmoid_.default": _sigmoid,
    "aten.max_pool2d_with_indices.default": _pool("max_pool2d", "dilation"),
    "aten.avg_pool2d.default": _pool("avg_pool2d", "count_include_pad"),
    "aten.upsample_nearest2d.default": _upsample,
    "aten.constant_pad_nd.default": _pad,
    "aten.cat.default": _cat,
    "aten.add.Tensor": _arithmetic("add"),
    "aten.add_.Tensor": _arithmetic("add"),
    "aten.mul.Tensor": _arithmetic("mul"),
    "aten.mul_.Tensor": _arithmetic("mul"),
}
_SAME: dict[str, Callable[[Values], bool]] = {
    "aten.detach.default": lambda given: True,
    "aten.alias.default": lambda given: True,
    "aten.clone.default": lambda given: True,
    "aten.replication_pad2d.default": lambda given: not any(given["padding"]),
    "aten.reflection_pad2d.default": lambda given: not any(given["padding"]),
    "aten.view.default": _is_column,
}
