"""A quickened network answers and learns as before, from gradients that lie in memory as its tensors do."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from pipeline.architectures import build_learner
from pipeline.classes import Class, Classes
from pipeline.layout import quicken
from pipeline.network import ModelSpec

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))
UNET = ModelSpec(architecture="unet", classes=CLASSES, mpp=1.0, patch_size=64, width=8, depth=3)
OTHERS = [
    ModelSpec(architecture="unet", classes=CLASSES, mpp=1.0, patch_size=64, width=8, depth=2, residual_units=0),
    ModelSpec(architecture="basic_unet", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=4),
    ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=64, width=4, depth=2),
]


def learner(spec: ModelSpec) -> nn.Module:
    torch.manual_seed(3)
    network: nn.Module = build_learner(spec).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 64, 96, generator=generator).contiguous(memory_format=torch.channels_last)


def learnt(network: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The answer to some images, and the gradient of every weight by its name."""
    answer = network(images())
    answer.square().mean().backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    return answer.detach(), gradients


@pytest.mark.parametrize("spec", [UNET, *OTHERS], ids=lambda spec: f"{spec.architecture}-{spec.residual_units}")
def test_answers_gradients_and_names_stay(spec: ModelSpec) -> None:
    network = learner(spec)
    quick = deepcopy(network)
    quicken(quick)
    (expected, gradients), (answer, quick_gradients) = learnt(network), learnt(quick)
    torch.testing.assert_close(answer, expected)
    assert list(quick.state_dict()) == list(network.state_dict())
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_lie_as_tensors_do() -> None:
    """Without `quicken`, those of what is concatenated are slices, and the two classes lie side by side."""
    found = {quickened: _layouts(quickened) for quickened in (False, True)}
    assert not all(found[False])
    assert all(found[True])


def _layouts(quickened: bool) -> list[bool]:
    """Whether each layer's answer has channels side by side, or rows where they are few, and its gradient as well."""
    network, kept = learner(UNET), list[bool]()
    if quickened:
        quicken(network)

    def look(module: nn.Module, inputs: object, answer: torch.Tensor) -> None:
        layout = torch.channels_last if answer.shape[1] > 2 else torch.contiguous_format
        kept.append(answer.is_contiguous(memory_format=layout))
        answer.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: kept.append(gradient.is_contiguous(memory_format=layout))
        )

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            module.register_forward_hook(look)
    learnt(network)
    return kept
