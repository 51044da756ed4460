"""Muon, which learns filters in fewer steps than AdamW: it makes every direction of an update as large as the others.

The momentum of a step, as a matrix, is replaced by the nearest one whose singular values are all about 1 (Jordan et al.
2024, Muon: an optimizer for hidden layers in neural networks, https://kellerjordan.github.io/posts/muon/). torch's own Muon
takes no filters, and multiplies in bf16, which a processor without bf16 imitates at a small part of its speed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_MOMENTUM = 0.95
_ITERATIONS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)  # factors of x, x^3 and x^5: Jordan et al.
_AS_ADAMW = 0.2  # root mean square of AdamW's updates, so that its learning rates hold: Liu et al. 2025, arXiv:2502.16982


class Muon(torch.optim.Optimizer):
    """Learns weights of two dimensions and more, as matrices whose rows are the fewer of their input and output channels."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient, with Nesterov's momentum."""
        for group in self.param_groups:
            alike: dict[int, list[_Update]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    momentum.lerp_(weight.grad, 1 - _MOMENTUM)
                    update = _Update(weight, weight.grad.lerp(momentum, _MOMENTUM))
                    alike.setdefault(len(update.matrix), []).append(update)
            for updates in alike.values():
                towards = _towards_one(torch.stack([update.matrix @ update.matrix.T for update in updates]))
                for update, factor in zip(updates, towards, strict=True):
                    update.apply(factor, group["lr"], group["weight_decay"])


class _Update:
    """A weight, and what is to be taken from it, as a matrix with a row for each of its fewer channels.

    The columns come as they lie in memory, so that the matrix is no copy: it makes no difference to the singular values.
    """

    def __init__(self, weight: torch.Tensor, update: torch.Tensor) -> None:
        rows = int(update.shape[0] > update.shape[1])
        others = sorted(set(range(update.ndim)) - {rows}, key=update.stride, reverse=True)
        self.weight, self.order = weight, (rows, *others)
        self.laid_out = update.permute(self.order)
        self.matrix = self.laid_out.flatten(1)

    def apply(self, factor: torch.Tensor, rate: float, decay: float) -> None:
        """Take `factor` times the matrix from the weight, scaled to what AdamW's update would be."""
        scale = _AS_ADAMW * max(self.matrix.shape) ** 0.5
        self.weight.mul_(1 - rate * decay)
        self.weight.permute(self.order).sub_((factor @ self.matrix).view(self.laid_out.shape), alpha=rate * scale)


def _towards_one(grams: torch.Tensor) -> torch.Tensor:
    """What each X is multiplied by to have singular values of about 1, from all X X^T, (n, rows, rows) float32.

    Newton-Schulz iterations are polynomials of X X^T times X, so that all of them can be done to it, which has far fewer
    columns, and one product with X at the end is enough. The first divides X by its norm, which is the root of the trace.
    """
    linear, cubic, quintic = _QUINTIC
    squared = grams.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-14)[:, None, None]
    grams = grams / squared
    product = torch.eye(grams.shape[1], device=grams.device, dtype=grams.dtype).expand_as(grams)
    for left in reversed(range(_ITERATIONS)):
        factor = torch.baddbmm(grams, grams, grams, beta=cubic, alpha=quintic)
        factor.diagonal(dim1=1, dim2=2).add_(linear)
        product = factor @ product
        if left:
            grams = factor @ grams @ factor
    return product / squared.sqrt()
