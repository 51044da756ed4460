"""Shares of a batch in two processes against torch on the batch itself, in double precision."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import distributed, nn

from pipeline.processes import together
from pipeline.whole_batch import whole, with_whole_batch_norm

BATCH, STEPS = 6, 3


def network() -> nn.Module:
    torch.manual_seed(4)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(5, eps=1e-3, momentum=None), nn.BatchNorm2d(2, affine=False)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 5, 3))
    return nn.Sequential(inner, norms[1], nn.ReLU(), nn.Conv2d(5, 2, 1), norms[2]).double()


def batch(step: int) -> torch.Tensor:
    """Patches that differ in brightness and contrast, so that the statistics of one are not those of all."""
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(BATCH, 3, 9, 7, generator=generator, dtype=torch.float64)
    order = torch.arange(1.0, BATCH + 1).double()[:, None, None, None]
    return values * order + 10 * order


def loss(logits: torch.Tensor) -> torch.Tensor:
    """One that is no mean over patches."""
    shares = logits.softmax(1)
    return shares[:, 0].std() / shares[:, 1].sum() + logits.pow(2).mean()


def results(learner: nn.Module, rank: int, size: int) -> dict[str, np.ndarray]:
    """What a process finds in a few steps without changing weights: all of the whole batch."""
    found = {}
    for step in range(STEPS):
        share = batch(step)[rank::size].requires_grad_()
        logits = learner(share)
        value = loss(whole(logits) if size > 1 else logits)
        learner.zero_grad()
        value.backward()
        gradients = [parameter.grad for parameter in learner.parameters()]
        if size > 1:
            for gradient in gradients:  # as DistributedDataParallel does
                distributed.all_reduce(gradient)
                gradient /= size
        images = share.grad if size == 1 else whole(share.grad) / size
        found |= {f"{step} logits": logits if size == 1 else whole(logits), f"{step} images": images, f"{step} loss": value}
        found |= {f"{step} gradient {index}": gradient.clone() for index, gradient in enumerate(gradients)}
        found |= {f"{step} state {name}": tensor.clone() for name, tensor in learner.state_dict().items()}
    found["in use"] = learner.eval()(batch(0))
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def shares() -> Iterator[dict[str, np.ndarray]]:
    distributed.init_process_group("gloo")
    yield results(with_whole_batch_norm(network()), distributed.get_rank(), distributed.get_world_size())
    distributed.destroy_process_group()


def test_shares_know_what_the_batch_knows() -> None:
    expected = results(network(), 0, 1)
    (found,) = together(shares, (), 2, 1)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-10, atol=1e-10, err_msg=name)


def half() -> Iterator[tuple[str, float]]:
    distributed.init_process_group("gloo")
    norm, share = with_whole_batch_norm(nn.BatchNorm2d(3)), batch(0).float()[distributed.get_rank() :: 2]
    exact, found = norm(share), norm(share.bfloat16())
    yield str(found.dtype), float((found - exact).abs().max().detach())
    distributed.destroy_process_group()


def test_half_precision_is_normalised_in_fp32() -> None:
    ((kind, difference),) = together(half, (), 2, 1)
    assert kind == "torch.bfloat16" and 0 < difference < 0.05
