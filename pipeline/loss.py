"""What training lowers: Dice and cross-entropy over the pixels of which something is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.losses.dice import DiceLoss
from torch.nn import functional

from pipeline.classes import IGNORED

_REACH = 3  # pixels on either side of a boundary
_STEPS = (1, 2, 3)  # by which a window grows from 1 px to 7: each time two of its size, that far apart, are joined


class Loss:
    """`class_weights`, one a class, say how much a pixel counts in the cross-entropy; near another class it counts
    1 + `boundary_weight` times as much (Ronneberger et al. 2015, U-Net, where a map of distances does so).
    """

    def __init__(self, class_weights: Sequence[float], boundary_weight: float) -> None:
        self.boundary_weight = boundary_weight
        self.class_weights = np.zeros(IGNORED + 1, np.float32)
        self.class_weights[: len(class_weights)] = class_weights
        self._dice = DiceLoss(batch=True)

    def weights(self, truth: np.ndarray) -> np.ndarray:
        """How much each pixel counts in the cross-entropy: (N, h, w) uint8 to float32; 0 where nothing is known."""
        weights: np.ndarray = self.class_weights[truth]
        if self.boundary_weight:
            weights *= 1 + np.float32(self.boundary_weight) * near_boundary(truth)
        return weights

    def __call__(self, logits: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One number for (N, C, h, w) against class indices and their `weights`, (N, h, w) both; 0 where nothing is known.

        The weights come from outside, since each process has those of its share of a batch.
        """
        known = truth != IGNORED
        if not known.any():
            return logits.sum() * 0
        entropy = (functional.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="none") * weights).sum()
        one_hot = truth[:, None] == torch.arange(logits.shape[1], device=truth.device)[:, None, None]  # IGNORED is no class
        overlap = self._dice(logits.softmax(1) * known[:, None], one_hot.to(logits.dtype))
        total: torch.Tensor = entropy / weights.sum() + overlap
        return total


def near_boundary(truth: np.ndarray) -> np.ndarray:
    """Which known pixels have one of another class within 3 px along rows and columns: (N, h, w) uint8 to bool."""
    known = truth != IGNORED
    return np.asarray(known & (_around(np.maximum, truth * known) > _around(np.minimum, truth)))


def _around(extreme: np.ufunc, truth: np.ndarray) -> np.ndarray:
    """The highest or lowest class within 3 px of each pixel, as far as the patch reaches: (N, h, w) to the same."""
    found = np.pad(truth, ((0, 0), (_REACH, _REACH), (_REACH, _REACH)), "edge")
    for axis in (1, 2):
        lines = np.moveaxis(found, axis, 0)
        for step in _STEPS:  # whole lines at once, which takes a tenth of the time that scipy's filters take
            lines = extreme(lines[:-step], lines[step:])
        found = np.moveaxis(lines, 0, axis)
    return found
