"""Tensors laid out in memory so that a processor is quick at a training step.

Channels that lie side by side (channels_last) are quickest, but for two things that a UNet does:

- What it concatenates gets slices of one gradient, whose channels lie scattered; all that follows goes through them in small
  pieces. `_Joined` hands out whole gradients.
- Layers of few channels, such as those for the classes, have too few values side by side for an instruction; there, rows are
  quicker.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.layers.simplelayers import SkipConnection
from torch import nn

_FEW = 8  # channels


def quicken(network: nn.Module) -> None:
    """Let a network, whose tensors are channels_last, learn faster; its weights, their names and its answers stay.

    Tracing such a network is not possible: quicken a copy.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, SkipConnection) and child.mode == "cat" and child.dim == 1:
                module.add_module(name, _Skip(child.submodule))
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.out_channels < _FEW:
            module.register_forward_hook(_as_rows)


class _Skip(nn.Module):
    """In place of MONAI's concatenating SkipConnection; its attribute has the same name, and so have its weights."""

    def __init__(self, submodule: nn.Module) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same and, behind it, what the submodule makes of it."""
        joined: torch.Tensor = _Joined.apply(features, self.submodule(features))  # type: ignore[no-untyped-call]
        return joined


class _Joined(torch.autograd.Function):
    """Two tensors, one behind the other along the channels, with whole gradients."""

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        ctx.channels = first.shape[1], second.shape[1]
        return torch.cat([first, second], 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = torch.split(gradient, ctx.channels, 1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


def _as_rows(module: nn.Module, inputs: object, answer: torch.Tensor) -> torch.Tensor:
    return answer.contiguous()
