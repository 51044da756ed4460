"""The same network in fewer steps, for inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from pipeline.graph import IMAGE, OPERATIONS, Graph, GraphNetwork, Node, described

_CONVOLUTIONS = ("conv2d", "conv_transpose2d")
_IN_PLACE = ("relu", "leaky_relu", "add")


def fuse(network: GraphNetwork) -> GraphNetwork:
    """A network with the same answers, and weights of its own.

    Batch norm after a convolution becomes part of it, worked out in float64; ReLUs and sums write over what they read where
    nobody reads it later. The new weights are named after the nodes.
    """
    graph, given = network.graph, network.state_dict()
    readers = _readers(graph)
    convolutions = {node.name: node for node in graph.nodes if node.op in _CONVOLUTIONS and readers[node.name] == 1}
    norms = {node.inputs[0]: node for node in graph.nodes if node.op == "batch_norm" and node.inputs[0] in convolutions}
    renamed = {norm.name: convolution for convolution, norm in norms.items()}
    nodes, weights = list[Node](), dict[str, torch.Tensor]()
    for node in graph.nodes:
        if node.name in renamed:
            continue
        taken = _weights(node, given)
        if node.name in norms:
            taken = _folded(node, taken, norms[node.name], _weights(norms[node.name], given))
        weights |= {f"{node.name}.{role}": value for role, value in taken.items()}
        names = [f"{node.name}.{role}" if role in taken else None for role in OPERATIONS[node.op].weights]
        inputs = tuple(renamed.get(name, name) for name in node.inputs)
        nodes.append(replace(node, inputs=inputs, weights=tuple(names)))
    fused = Graph(tuple(nodes), described(weights), renamed.get(graph.output, graph.output))
    return GraphNetwork(_in_place(fused), weights).eval()


def _readers(graph: Graph) -> Counter[str]:
    """How often each value is read; the output is read by the caller."""
    return Counter([*(name for node in graph.nodes for name in node.inputs), graph.output])


def _weights(node: Node, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A node's weights by their roles, copied."""
    roles = zip(OPERATIONS[node.op].weights, node.weights, strict=True)
    return {role: given[name].detach().clone() for role, name in roles if name is not None}


def _folded(
    node: Node, weights: Mapping[str, torch.Tensor], norm: Node, statistics: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weight and bias of a convolution that gives what the batch norm after it gave."""
    kernel = weights["weight"].double()
    mean, variance = statistics["running_mean"].double(), statistics["running_var"].double()
    scale = (variance + float(str(norm.settings["eps"]))).rsqrt()
    if "weight" in statistics:
        scale = scale * statistics["weight"].double()
    bias = scale * (weights["bias"].double() - mean if "bias" in weights else -mean)
    if "bias" in statistics:
        bias = bias + statistics["bias"].double()
    if node.op == "conv_transpose2d":  # (in, out / groups, rows, columns): a group's inputs meet its own outputs only
        groups = int(str(node.settings["groups"]))
        grouped = kernel.reshape(groups, -1, *kernel.shape[1:]) * scale.reshape(groups, 1, -1, 1, 1)
        kernel = grouped.flatten(0, 1)
    else:
        kernel = kernel * scale.reshape(-1, 1, 1, 1)
    dtype = weights["weight"].dtype
    return {"weight": kernel.to(dtype), "bias": bias.to(dtype)}


def _in_place(graph: Graph) -> Graph:
    last = {name: node.name for node in graph.nodes for name in node.inputs}
    kept, nodes = {IMAGE, graph.output}, list[Node]()
    for node in graph.nodes:
        dead = all(last[name] == node.name and name not in kept for name in node.inputs)
        alone = node.op in _IN_PLACE and dead
        nodes.append(replace(node, settings={**node.settings, "inplace": True}) if alone else node)
    return replace(graph, nodes=tuple(nodes))
