"""A network as data: a list of operations that know no image size, and a module that runs it.

    image --conv2d--> conv2d --batch_norm--> batch_norm --relu--> relu --conv2d--> conv2d_1 = the output

Every node is one call of one of OPERATIONS, and names the values that it takes, the weights, and its settings. So a trained
network is run without the library that built it, and reading one from a file executes nothing that the file says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import CheckpointError

IMAGE = "image"
"""The name of the value that enters."""

Setting = bool | int | float | tuple[int, ...] | tuple[float, ...]
_LARGEST = 4096  # of any number of pixels or groups in a node's settings: nothing sensible comes near


@dataclass(frozen=True)
class Operation:
    """One kind of node: `run(*values, *weights, **settings)`.

    `values` counts the values it takes; None: one or more. `weights` are the roles of its weights; the `optional` ones may
    be missing. `settings` tells of each setting whether a value will do.
    """

    run: Callable[..., torch.Tensor]
    values: int | None = 1
    weights: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings: Mapping[str, Callable[[object], bool]] | None = None


@dataclass(frozen=True)
class Node:
    """One call; `name` is that of the value it gives. Weights stand in the order of the operation's roles."""

    name: str
    op: str
    inputs: tuple[str, ...]
    weights: tuple[str | None, ...]
    settings: Mapping[str, Setting]

    def fault(self) -> str | None:
        """What is wrong with the node by itself; None: nothing."""
        kind = OPERATIONS.get(self.op)
        if kind is None:
            return f"the operation {self.op!r}"
        wanted = kind.settings or {}
        if len(self.inputs) != kind.values if kind.values else not self.inputs:
            return f"{len(self.inputs)} inputs"
        roles = {role: name for role, name in zip(kind.weights, self.weights, strict=False) if name is not None}
        if len(self.weights) != len(kind.weights) or not set(kind.weights) - set(kind.optional) <= set(roles):
            return f"the weights {', '.join(map(str, self.weights)) or 'none'}"
        wrong = [key for key in {*wanted, *self.settings} if key not in wanted or not wanted[key](self.settings.get(key))]
        return f"{sorted(wrong)[0]} = {self.settings.get(sorted(wrong)[0])!r}" if wrong else None


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of their work, the network's weights, each described as in `described`, and the output's name."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, str]
    output: str

    def to_json(self) -> str:
        """Readable JSON, a line for each weight and each node."""
        weights = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in self.weights.items()]
        nodes = [json.dumps({**vars(node), "settings": dict(node.settings)}) for node in self.nodes]
        parts = [f'"weights": {{\n  {_lines(weights)}\n}}', f'"nodes": [\n  {_lines(nodes)}\n]']
        return f'{{\n{parts[0]},\n{parts[1]},\n"output": {json.dumps(self.output)}\n}}\n'

    @classmethod
    def from_json(cls, text: str, source: str) -> Graph:
        """The graph that `to_json` wrote; `source` names the text in errors. Raises CheckpointError on anything else."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _refused(source, f"broken JSON ({error})") from error
        if not isinstance(content, dict) or set(content) != {"weights", "nodes", "output"}:
            raise _refused(source, "other keys than weights, nodes and output")
        weights, nodes, output = content["weights"], content["nodes"], content["output"]
        if not isinstance(weights, dict) or not all(isinstance(value, str) for value in weights.values()):
            raise _refused(source, "weights that are not described by a text each")
        if not isinstance(nodes, list):
            raise _refused(source, f"nodes that are a {type(nodes).__name__}")
        known, found = {IMAGE}, list[Node]()
        for item in nodes:
            found.append(_node(item, known, weights, source))
            known.add(found[-1].name)
        if not isinstance(output, str) or output not in known - {IMAGE}:
            raise _refused(source, f"the output {output!r}, which no node gives")
        return cls(tuple(found), weights, output)


class GraphNetwork(nn.Module):
    """Runs a graph: (N, 3, H, W) float to what the graph's output is; `weights` is a state dict of the graph's weights.

    Its own state dict has the same names. Every value is let go after its last use. Raises KeyError where a weight's name
    cannot be that of an attribute.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.graph = graph
        for name, value in weights.items():
            _place(self, name, value)
        last = {name: place for place, node in enumerate(graph.nodes) for name in node.inputs}
        self._dead = [
            [name for name in dict.fromkeys(node.inputs) if last[name] == place and name != graph.output]
            for place, node in enumerate(graph.nodes)
        ]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The value of the graph's output."""
        weights = self.state_dict(keep_vars=True)
        values = {IMAGE: image}
        for node, dead in zip(self.graph.nodes, self._dead, strict=True):
            taken = (None if name is None else weights[name] for name in node.weights)
            run = OPERATIONS[node.op].run
            values[node.name] = run(*(values[name] for name in node.inputs), *taken, **node.settings)
            for name in dead:
                del values[name]
        return values[self.graph.output]


def described(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Size and type of each weight in words, as `16x3x3x3 float32`."""
    return {
        name: f"{'x'.join(map(str, value.shape)) or 'one'} {str(value.dtype).removeprefix('torch.')}"
        for name, value in weights.items()
    }


def numbered(op: str, count: int) -> str:
    """The name of the value of the operation's call of this number, from 0."""
    return f"{op}_{count}" if count else op


def _place(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Register a weight under its dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if value.is_floating_point():
        root.register_parameter(last, nn.Parameter(value, requires_grad=False))
    else:
        root.register_buffer(last, value)


def _node(item: object, known: set[str], weights: Mapping[str, str], source: str) -> Node:
    """A node of values that are known by then. Raises CheckpointError."""
    if not isinstance(item, dict) or set(item) != {"name", "op", "inputs", "weights", "settings"}:
        raise _refused(source, f"the node {str(item)[:80]}")
    name, op, settings = item["name"], item["op"], item["settings"]
    if not isinstance(op, str) or not isinstance(name, str) or not re.fullmatch(rf"{re.escape(op)}(_\d+)?", name):
        raise _refused(source, f"the node {str(name)[:80]!r}, not named after its operation")
    if name in known:
        raise _refused(source, f"{name} twice")
    if not isinstance(settings, dict):
        raise _refused(source, f"{name} with settings that are a {type(settings).__name__}")
    inputs, names = _names(item["inputs"], known), _names(item["weights"], {None, *weights})
    if inputs is None or names is None:
        raise _refused(source, f"{name} of {item['inputs']} and {item['weights']}, of which some are unknown")
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    node = Node(name, op, inputs, names, tuples)
    if fault := node.fault():
        raise _refused(source, f"{name} with {fault}")
    return node


def _names(value: object, known: Iterable[str | None]) -> tuple[Any, ...] | None:
    """A list of known names, as a tuple; None: it is something else."""
    if not isinstance(value, list) or not all(item is None or isinstance(item, str) for item in value):
        return None
    return tuple(value) if set(value) <= set(known) else None


def _lines(items: list[str]) -> str:
    return ",\n  ".join(items)


def _refused(source: str, found: str) -> CheckpointError:
    return CheckpointError(
        source, found, "a network's graph", "Use the file as Fullfield wrote it, or train the model again."
    )


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _maybe(value: object) -> bool:
    return value is None or _flag(value)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def _count(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _pixels(*counts: int, least: int = 0) -> Callable[[object], bool]:
    """Whether a value is a tuple of as many whole numbers from `least` up as one of the counts."""

    def holds(value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) in counts
            and all(type(item) is int and least <= item <= _LARGEST for item in value)
        )

    return holds


def _factors(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_number(item) and item > 0 for item in value)


def _add(first: torch.Tensor, second: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    return first.add_(second) if inplace and first.shape == second.shape else first + second


def _join(*values: torch.Tensor) -> torch.Tensor:
    return torch.cat(values, dim=1)


_steps, _gaps, _inplace = _pixels(2, least=1), _pixels(2), {"inplace": _flag}
_convolution = {"stride": _steps, "padding": _gaps, "dilation": _steps, "groups": _count}
_pooling = {"kernel_size": _steps, "stride": _steps, "padding": _gaps, "ceil_mode": _flag}
_norm = ("running_mean", "running_var", "weight", "bias")
OPERATIONS = {
    "conv2d": Operation(functional.conv2d, 1, ("weight", "bias"), ("bias",), _convolution),
    "conv_transpose2d": Operation(
        functional.conv_transpose2d, 1, ("weight", "bias"), ("bias",), {**_convolution, "output_padding": _gaps}
    ),
    "batch_norm": Operation(functional.batch_norm, 1, _norm, _norm[2:], {"eps": _number}),
    "relu": Operation(functional.relu, settings=_inplace),
    "leaky_relu": Operation(functional.leaky_relu, settings={"negative_slope": _number, **_inplace}),
    "prelu": Operation(functional.prelu, weights=("weight",)),
    "sigmoid": Operation(torch.sigmoid),
    "max_pool2d": Operation(functional.max_pool2d, settings={**_pooling, "dilation": _steps}),
    "avg_pool2d": Operation(functional.avg_pool2d, settings={**_pooling, "count_include_pad": _flag}),
    "upsample_nearest2d": Operation(partial(functional.interpolate, mode="nearest"), settings={"scale_factor": _factors}),
    "pad": Operation(functional.pad, settings={"pad": _pixels(2, 4, 6), "value": _number}),
    "cat": Operation(_join, None),
    "add": Operation(_add, 2, settings={"inplace": _maybe}),
    "mul": Operation(torch.mul, 2),
}
"""What a graph may consist of: nothing here depends on an image's size, or is bound to a place in it."""
