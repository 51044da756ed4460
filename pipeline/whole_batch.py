"""What looks at a whole batch while each process holds a share of it: the loss, and batch norm.

Process r of W holds the patches r, r + W, r + 2 W... of every batch; all shares are as large. So each process can say what
one that held the batch would have said, and the weights are the same however many processes there are, to rounding.

Every process computes the same loss. What is differentiated is their sum, W times the loss, and the gradients of the weights
are then averaged over the processes, as DistributedDataParallel does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional


def whole(share: torch.Tensor) -> torch.Tensor:
    """The whole batch (N, ...) of which each process gives its share (N / W, ...), in the batch's order; differentiable.

    A training sends its logits in this way: any loss is then that of the whole batch, and none has to be taken apart.
    """
    gathered: torch.Tensor = _Gather.apply(share)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, share: torch.Tensor) -> torch.Tensor:
        share = share.contiguous()
        shares = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
        distributed.all_gather(shares, share)
        return torch.stack(shares, 1).flatten(0, 1)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        processes = distributed.get_world_size()  # each of which computes the same from the share
        return gradient[distributed.get_rank() :: processes] * processes


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, share: torch.Tensor) -> torch.Tensor:
        total = share.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(context, gradient)


def with_whole_batch_norm(network: nn.Module) -> nn.Module:
    """The same network, whose batch norms take the statistics of the whole batch; on CPUs, where torch has none that do."""
    if isinstance(network, nn.BatchNorm2d):
        norm = WholeBatchNorm(network.num_features, network.eps, network.momentum, network.affine)
        norm.load_state_dict(network.state_dict(), assign=True)
        return norm
    for name, child in network.named_children():
        network.add_module(name, with_whole_batch_norm(child))
    return network


class WholeBatchNorm(nn.BatchNorm2d):
    """torch's BatchNorm2d over a batch (N, C, H, W) of which each process holds as large a share.

    Mean and variance are pooled from those of the shares (Chan et al. 1983, Algorithms for Computing the Sample Variance):
    the variance is the mean of theirs and that of their means.
    """

    def forward(self, share: torch.Tensor) -> torch.Tensor:
        """The share, (N / W, C, H, W), normalised by the statistics of the batch; of bf16 too in fp32."""
        if not self.training:
            return super().forward(share)
        processes, rank = distributed.get_world_size(), distributed.get_rank()
        wide = share.to(torch.promote_types(share.dtype, torch.float32))
        own = torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0))
        row = functional.pad(own[..., None], (rank, processes - 1 - rank))  # (2, C, W): zeros but for its own column
        variances, means = _Sum.apply(row).unbind()  # type: ignore[no-untyped-call]
        mean = means.mean(1)
        variance = variances.mean(1) + means.var(1, correction=0)
        with torch.no_grad():
            self._remember(mean, variance, processes * share.numel() // len(mean))
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        normalised: torch.Tensor = wide * scale[:, None, None] + shift[:, None, None]
        return normalised.to(share.dtype)

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """Move the running statistics as torch does, by the unbiased variance."""
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)
