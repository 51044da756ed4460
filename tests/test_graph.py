"""A graph does what its network did, at every size; what is tied to a size, or was tampered with, is refused."""

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline import graph as house
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.errors import CheckpointError, NetworkError
from pipeline.fusion import fuse
from pipeline.graph import OPERATIONS, Graph, GraphNetwork
from pipeline.network import ModelSpec, activation
from pipeline.tracing import trace

CLASSES = Classes((Class("Gland", (200, 40, 40)), Class("Stroma", (40, 200, 40)), Class("Fat", (240, 240, 80))))


def spec(architecture: str = "fcn", **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"classes": CLASSES, "mpp": 1.0, "patch_size": 64, "width": 4, "depth": 3}
    return ModelSpec(architecture=architecture, **{**values, **changes})


ALL = {
    "fcn": spec(),
    "fcn strided": spec(downsample="stride", upsample="transpose"),
    "heatmap": spec("heatmap"),
    "heatmap strided": spec("heatmap", downsample="stride"),
    "classifier": spec("classifier"),
    "unet": spec("unet"),
    "basic_unet": spec("basic_unet", depth=4),
    "resnet10": spec("flexible_unet", depth=5, encoder="resnet10"),
    "resnet18": spec("flexible_unet", depth=5, encoder="resnet18", upsample="transpose"),  # pads channels with zeros
}


@cache
def lively(name: str) -> nn.Module:
    """A network whose batch statistics, scales and shifts are those of no new one, in training mode."""
    torch.manual_seed(0)
    network = build_network(ALL[name])
    with torch.no_grad():
        network.train()(torch.randn(2, 3, 32 if ALL[name].depth < 5 else 64, 64))
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
    return network


@cache
def traced(name: str) -> GraphNetwork:
    return GraphNetwork(trace(lively(name), ALL[name]), lively(name).state_dict()).eval()


def image(height: int = 96, width: int = 160) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return deepcopy(network).eval()(pixels)


@pytest.mark.parametrize("name", ALL)
def test_a_graph_does_what_its_network_does_and_fused_nearly(name: str) -> None:
    network, pixels = traced(name), image()
    assert lively(name).training and network.state_dict().keys() == lively(name).state_dict().keys()
    expected = answer(lively(name), pixels)
    assert torch.equal(answer(network, pixels), expected)
    fused = fuse(network)
    assert "batch_norm" in {node.op for node in network.graph.nodes}
    assert "batch_norm" not in {node.op for node in fused.graph.nodes}
    assert (activation(answer(fused, pixels)) - activation(expected)).abs().max() < 1e-6
    assert torch.equal(answer(network, pixels), expected)  # fusing changed nothing in what it was given


def test_a_sum_takes_no_memory_where_what_it_sums_is_read_no_more() -> None:
    sums = [node for node in fuse(traced("unet")).graph.nodes if node.op == "add"]
    assert sums and all(node.settings["inplace"] for node in sums)


@pytest.mark.parametrize("name", ALL)
def test_a_graph_survives_json(name: str) -> None:
    found = traced(name).graph
    assert Graph.from_json(found.to_json(), "network.json") == found
    assert len(found.to_json().splitlines()) == len(found.nodes) + len(found.weights) + 7


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")  # tracing fixes which sums are made in place
def test_torch_can_trace_what_runs_a_graph() -> None:
    fused = fuse(traced("fcn"))
    with torch.no_grad():
        script = torch.jit.trace(fused, image(16, 24), check_trace=False)
        assert torch.equal(script(image()), fused(image()))


def test_values_live_no_longer_than_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def sigmoid(value: torch.Tensor) -> torch.Tensor:
        nonlocal most
        result = torch.sigmoid(value)
        given.append(weakref.ref(result))
        most = max(most, sum(item() is not None for item in given))
        return result

    monkeypatch.setitem(OPERATIONS, "sigmoid", house.Operation(sigmoid))
    network = nn.Sequential(nn.Conv2d(3, 2, 1), *(nn.Sigmoid() for _ in range(6)))
    chain = GraphNetwork(trace(network, spec()), network.state_dict())
    gc.collect()
    given.clear()
    most = 0
    chain(image())
    assert most == 2


class Custom(nn.Module):
    """A convolution, and whatever is done with it."""

    def __init__(self, forward: Callable[["Custom", torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor([0.2]))
        self.noise = torch.randn(1, 2, 1, 1)
        self.body = forward

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.body(self, pixels)


def _summed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    both = one + other
    return (both + functional.relu(one)) * other + both


def _in_place(net: Custom, x: torch.Tensor) -> torch.Tensor:
    first = net.layer(x)
    second = first.relu_()
    first += net.layer(x)  # second is the same tensor
    return torch.cat([first, second], dim=1).mul_(torch.cat([second, first], dim=1))


TAKEN: dict[str, Callable[[Custom, torch.Tensor], torch.Tensor]] = {
    "in place": _in_place,
    "prelu": lambda net, x: functional.prelu(net.layer(x), net.scale),
    "leaky": lambda net, x: functional.leaky_relu(net.layer(x), 0.2),
    "sigmoid gate": lambda net, x: net.layer(x) * torch.sigmoid(net.layer(x)),
    "average": lambda net, x: functional.avg_pool2d(net.layer(x), 2, count_include_pad=False),
    "dropout": lambda net, x: functional.dropout2d(net.layer(x), 0.5, net.training),
    "pads": lambda net, x: functional.pad(net.layer(x), (1, 2, 0, 3), value=0.5),
    "sum of what is read again": lambda net, x: _summed(net.layer(x), net.layer(functional.relu(x))),
    "sum with itself": lambda net, x: functional.relu(net.layer(x) + net.layer(x)),
    "padding by nothing": lambda net, x: functional.pad(net.layer(x), (0, 0, 0, 0), "replicate"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_else_a_graph_holds(name: str) -> None:
    network = Custom(TAKEN[name])
    found = GraphNetwork(trace(network, spec()), network.state_dict())
    for runs in (found, fuse(found)):
        assert torch.equal(answer(runs, image()), answer(network, image()))


REFUSED: dict[str, tuple[Callable[[Custom, torch.Tensor], Any], str]] = {
    "upsampling to a size": (lambda net, x: functional.interpolate(net.layer(x), x.shape[2:]), "upsample_nearest2d"),
    "bilinear": (lambda net, x: functional.interpolate(net.layer(x), scale_factor=2, mode="bilinear"), "bilinear"),
    "view": (lambda net, x: net.layer(x).flatten(2).reshape(1, 2, *x.shape[2:]), "aten.view"),
    "crop": (lambda net, x: net.layer(x)[:, :, :8], "aten.slice"),
    "mean": (lambda net, x: net.layer(x) + net.layer(x).mean((2, 3), keepdim=True), "aten.mean"),
    "branch": (lambda net, x: net.layer(x) if net.layer(x)[0, 0, 0, 0] > 0 else x, "aten.select"),
    "number of an image": (lambda net, x: x if float(net.layer(x[:0]).sum()) else x, "aten.slice"),
    "asks a pixel": (lambda net, x: net.layer(x) * x.max().item(), "aten.max"),
    "rows": (lambda net, x: net.layer(x) + torch.arange(x.shape[2])[:, None], "does not follow from the image"),
    "noise": (lambda net, x: net.layer(x) + net.noise, "does not follow from the image"),
    "scaled": (lambda net, x: net.layer(x) * (1 / x.shape[2]), "aten.mul"),
    "weights worked out": (lambda net, x: functional.conv2d(x, net.layer.weight * 2), "aten.mul"),
    "instance norm": (lambda net, x: functional.instance_norm(net.layer(x)), "aten.view"),
    "batch statistics": (lambda net, x: functional.batch_norm(net.layer(x), None, None, training=True), "batch_norm"),
    "cat of rows": (lambda net, x: torch.cat([net.layer(x), net.layer(x)], dim=2), "aten.cat"),
    "assignment": (lambda net, x: x.__setitem__((0, 0), 0.0) or net.layer(x), "aten.select"),
    "pad by size": (lambda net, x: functional.pad(net.layer(x), (0, x.shape[3] - 24)), "follow from the image's size"),
    "fails": (lambda net, x: net.layer(x[:, :2]), "aten.slice"),
    "wrong channels": (lambda net, x: net.layer(net.layer(x)), "a forward pass that fails"),
    "constant": (lambda net, x: torch.zeros(1, 2, *x.shape[2:]), "no value of the image's"),
    "two answers": (lambda net, x: (net.layer(x), x), "no value of the image's"),
    "the image": (lambda net, x: x, "no value of the image's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_holds_is_refused_by_name(name: str) -> None:
    forward, word = REFUSED[name]
    with pytest.raises(NetworkError, match=word):
        trace(Custom(forward), spec())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_batch_norm_folds_into_every_convolution(kind: type[nn.Conv2d], affine: bool, groups: int) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, affine=affine)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.1, 2)  # type: ignore[union-attr]
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, 6, (3, 2), stride=2, groups=groups, bias=affine), norm).double()
    fused = fuse(GraphNetwork(trace(network.float(), spec()), network.double().state_dict()))
    assert [node.op for node in fused.graph.nodes] == [node.op for node in fused.graph.nodes if node.op != "batch_norm"]
    assert (answer(fused, image().double()) - answer(network, image().double())).abs().max() < 1e-12


class Shared(nn.Module):
    """A convolution that several read: a sum, or the caller of the network and something that nobody reads."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.layer, self.norm, self.answer = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), answer
        self.norm.running_mean.fill_(0.7)  # type: ignore[union-attr]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first, other = self.layer(pixels), self.layer(functional.relu(pixels))
        if self.answer == "sum":
            return self.norm(first) + functional.relu(first) + other
        self.norm(first), functional.relu(other)
        return first if self.answer == "normalised" else other


@pytest.mark.parametrize("answer_is", ["sum", "normalised", "rectified"])
def test_what_others_read_is_neither_folded_nor_overwritten(answer_is: str) -> None:
    network = Shared(answer_is)
    fused = fuse(GraphNetwork(trace(network, spec()), network.state_dict()))
    ops = Counter(node.op for node in fused.graph.nodes)
    assert ops["batch_norm"] == (answer_is != "rectified")
    pixels = image()
    assert torch.equal(answer(fused, pixels), answer(network, pixels)) and torch.equal(pixels, image())


def test_weights_that_are_shared_stay_shared() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1))
    network[1].weight = network[0].weight
    found = GraphNetwork(trace(network, spec()), network.state_dict())
    assert found.graph.nodes[0].weights[0] == found.graph.nodes[1].weights[0]
    assert torch.equal(answer(fuse(found), image()), answer(network, image()))


def _content(**changes: Any) -> str:
    """A small graph's JSON; the changes are to its second node, a convolution, or to the whole."""
    node: dict[str, Any] = {"name": "conv2d", "op": "conv2d", "inputs": ["relu"], "weights": ["a.weight", None]}
    node["settings"] = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    relu = {"name": "relu", "op": "relu", "inputs": ["image"], "weights": [], "settings": {"inplace": False}}
    whole: dict[str, Any] = {"weights": {"a.weight": "2x3x1x1 float32"}, "nodes": [relu, node], "output": "conv2d"}
    for key, value in changes.items():
        (whole if key in ("nodes", "output", "extra") or isinstance(value, dict) and key == "weights" else node)[key] = value
    return json.dumps(whole)


def test_the_json_that_hostile_ones_are_made_of_is_good() -> None:
    assert len(Graph.from_json(_content(), "x").nodes) == 2


def _settings(**changes: Any) -> str:
    good = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    return _content(settings={key: value for key, value in {**good, **changes}.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("[]", "other keys"),
        (_content(extra=1), "other keys"),
        (_content(weights={"a.weight": 3}), "described by a text"),
        (_content(weights={}), "some are unknown"),
        (_content(nodes={}), "nodes that are a dict"),
        (_content(nodes=[]), "the output 'conv2d', which no node gives"),
        (_content(nodes=[3]), "the node 3"),
        (_content(output="image"), "the output 'image'"),
        (_content(output=["conv2d"]), "the output"),
        (_content(name="relu"), "not named after its operation"),
        (_content(name="__class__"), "not named after"),
        (_content(name=["conv2d"]), "not named after"),
        (_content(op="relu", name="relu"), "relu twice"),
        (_content(op="system", name="system"), "the operation 'system'"),
        (_content(op="conv2d|.*", name="forward"), "not named after"),
        (_content(op=["conv2d"]), "not named after"),
        (_content(inputs=["conv2d"]), "some are unknown"),
        (_content(inputs=["relu", "relu"]), "2 inputs"),
        (_content(inputs=[]), "0 inputs"),
        (_content(inputs=[None]), "unknown"),
        (_content(inputs="image"), "unknown"),
        (_content(inputs=[["relu"]]), "unknown"),
        (_content(weights=["a.weight"]), "the weights a.weight"),
        (_content(weights=[None, None]), "the weights None, None"),
        (_content(weights=["b", None]), "unknown"),
        (_content(settings=[1]), "settings that are a list"),
        (_settings(groups=0), "groups = 0"),
        (_settings(groups=True), "groups = True"),
        (_settings(groups="1"), "groups = '1'"),
        (_settings(groups=...), "groups = None"),
        (_settings(stride=[1]), "stride"),
        (_settings(stride=[1, 0]), "stride"),
        (_settings(padding=[10**9, 0]), "padding"),
        (_settings(padding=[0.5, 0]), "padding"),
        (_settings(padding=-1), "padding"),
        (_settings(out="x"), "out = 'x'"),
    ],
)
def test_a_hostile_graph_is_refused(text: str, word: str) -> None:
    with pytest.raises(CheckpointError, match=word) as caught:
        Graph.from_json(text, "model/network.json")
    assert caught.value.subject == "model/network.json"
