"""The loss against what its formula gives, and which pixels count, and how much."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.classes import IGNORED
from pipeline.loss import Loss, near_boundary


def test_the_unknown_counts_for_nothing() -> None:
    loss = Loss([1.0, 1.0], 0.0)
    logits = torch.randn(2, 2, 8, 12, requires_grad=True)
    truth = torch.randint(0, 2, (2, 8, 12))
    truth[:, :, 5:] = IGNORED
    loss_of(loss, logits, truth).backward()
    assert logits.grad[:, :, :, 5:].abs().max() == 0
    assert logits.grad[:, :, :, :5].abs().min() > 0
    loss_of(loss, logits, torch.full_like(truth, IGNORED)).backward()


def loss_of(loss: Loss, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    weights = loss.weights(truth.numpy().astype(np.uint8))
    return loss(logits, truth, torch.from_numpy(weights))


def test_pixels_near_another_class_are_found_as_a_slow_search_finds_them() -> None:
    truth = np.random.default_rng(0).choice([0, 0, 0, 0, 0, 1, 2, IGNORED], (2, 3, 5), True).astype(np.uint8)
    truth = truth.repeat(7, axis=1).repeat(5, axis=2)
    expected = np.zeros(truth.shape, bool)
    for patch, row, column in np.ndindex(truth.shape):
        around = truth[patch, max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4]
        others = set(np.unique(around).tolist()) - {IGNORED, truth[patch, row, column]}
        expected[patch, row, column] = truth[patch, row, column] != IGNORED and bool(others)
    found = near_boundary(truth)
    assert np.array_equal(found, expected) and 0.1 < found.mean() < 0.9
    assert not near_boundary(truth[:, :1, :1]).any()  # as a classifier is asked for one pixel a patch


def test_pixels_near_a_boundary_count_more() -> None:
    truth = np.zeros((1, 20, 20), np.uint8)
    truth[:, :, 10:], truth[:, 15:] = 1, IGNORED
    weights = Loss([1.0, 2.0], 4.0).weights(truth)
    assert np.array_equal(np.unique(weights[:, :15]), [1, 2, 5, 10]) and not weights[:, 15:].any()
    assert (weights[:, :15, 7:13] == [5] * 3 + [10] * 3).all()
    assert np.array_equal(np.unique(Loss([1.0, 1.0], 0.0).weights(truth)), [0, 1])


def test_the_loss_is_dice_and_cross_entropy() -> None:
    logits, truth = torch.randn(3, 2, 8, 12), torch.randint(0, 2, (3, 8, 12))
    shares = logits.softmax(1)
    dice = []
    for index in range(2):
        is_class = (truth == index).float()
        overlap = (shares[:, index] * is_class).sum()
        dice.append(1 - 2 * overlap / (shares[:, index].sum() + is_class.sum()))
    each, near = functional.cross_entropy(logits, truth, reduction="none"), near_boundary(truth.numpy())
    counts = torch.from_numpy(1 + 3.0 * near)
    expected = torch.stack(dice).mean() + (each * counts).sum() / counts.sum()
    assert loss_of(Loss([1.0, 1.0], 3.0), logits, truth).item() == pytest.approx(expected.item(), abs=1e-4)
