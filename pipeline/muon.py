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
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - _MOMENTUM)
                update = _orthogonal(weight.grad.lerp(momentum, _MOMENTUM))
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def learns(weight: torch.Tensor, classes: int) -> bool:
    """Whether Muon suits a weight: a matrix or filters, neither of the first layer nor of the last.

    Those layers, which see colours and give classes, have few channels on one side, and learn better with AdamW.
    """
    return weight.ndim > 1 and min(weight.shape[:2]) > max(3, classes)


def _orthogonal(update: torch.Tensor) -> torch.Tensor:
    """The update with singular values of about 1, scaled to what AdamW's would be; of the same shape."""
    rows = int(update.shape[0] > update.shape[1])
    moved = update.movedim(rows, 0)
    matrix = moved.flatten(1)
    unit = matrix / matrix.norm().clamp(min=1e-7)
    scale: float = _AS_ADAMW * max(matrix.shape) ** 0.5
    towards: torch.Tensor = _towards_one(unit @ unit.T) @ unit
    return towards.mul_(scale).view(moved.shape).movedim(0, rows)


def _towards_one(gram: torch.Tensor) -> torch.Tensor:
    """What X is multiplied by to have singular values of about 1, from X X^T, which has far fewer columns than X.

    Newton-Schulz iterations are polynomials of X X^T times X, so that all of them can be done to it, and one product with X
    at the end is enough.
    """
    linear, cubic, quintic = _QUINTIC
    product = identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    for _ in range(_ITERATIONS):
        factor = linear * identity + cubic * gram + quintic * (gram @ gram)
        product, gram = factor @ product, factor @ gram @ factor
    return product
