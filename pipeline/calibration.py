"""Whether a probability means what it says: of the pixels called with 80 %, four in five should be right.

Known, examined pixels are sorted into 15 bins of equal width by the probability of the class that won. With n the pixels
of a bin, acc the share of them that is right, and conf their mean probability:

    ECE = sum over bins of n / N |acc - conf|             the expected calibration error, 0 is best

For one class, the sum is over the pixels that were called so. A bin reaches from above its lower edge to its upper edge.

Networks that are pooled hide each other's errors: where one is too sure and another not sure enough, a bin of both may be
right. So of several the ECE is the mean of their own, by pixels: each has its bins by itself.

ECE is too high where patients are few, and its interval with it: by how much patients differ in a bin counts as error, in
whichever direction. With nine patients of GlaS taken as all there are, and as examined by one network, intervals of 6, 9 and
15 drawn from them held their ECE in 74, 86 and 90 % where that was 0.005, and lay above it else; in 92 to 94 % where it was
ten times as large.

References: Naeini, Cooper and Hauskrecht 2015, AAAI 29:2901; Guo et al. 2017, ICML 70:1321, arXiv:1706.04599, section 2
(15 bins; the picture is their reliability diagram); for one class: Gupta and Ramdas 2022, ICLR, arXiv:2107.08353.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.bootstrap import Counts, Floats
from pipeline.classes import IGNORED
from pipeline.files import replacing

Bytes = npt.NDArray[np.uint8]

BINS = 15
_WIDTH = 255 // BINS  # levels of probability: 1 to 17, 18 to 34, ..., and 0 in the first


def count_reliability(truth: Bytes, labels: Bytes, probabilities: Bytes) -> Counts:
    """How sure and how right the predictions are: (C, 15, 3) int64: pixels, sum of probability (of 255), right ones.

    `truth` and `labels` are (rows, columns) class indices, or IGNORED: such pixels are left out; `probabilities` is
    (C, rows, columns), 255 times the probability. The first axis is the class that was called.
    """
    examined = (truth != IGNORED) & (labels != IGNORED)
    called, right = labels[examined], truth[examined] == labels[examined]
    joint = (called.astype(np.int64) << 9) | (right.astype(np.int64) << 8) | probabilities.max(axis=0)[examined]
    table = np.bincount(joint, minlength=len(probabilities) << 9).reshape(len(probabilities), 2, 256)
    levels = np.arange(256)
    pixels, correct = table.sum(axis=1), table[:, 1]
    starts = np.concatenate([[0], np.arange(1, BINS) * _WIDTH + 1])
    return np.stack([np.add.reduceat(part, starts, axis=1) for part in (pixels, pixels * levels, correct)], axis=-1)


def apart(counts: Counts, number: int, networks: int) -> Counts:
    """(C, 15, 3) counts as (C, 15 * networks, 3), in the bins of network `number` and in none of the others."""
    bins = np.zeros((len(counts), networks, *counts.shape[1:]), counts.dtype)
    bins[:, number] = counts
    return bins.reshape(len(counts), -1, counts.shape[-1])


def calibration_error(counts: Counts) -> Floats:
    """ECE of (..., B, 3) counts in B bins, 15 or those of several networks, (...); NaN where there are no pixels."""
    pixels, confidence, correct = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(correct - confidence / 255).sum(axis=-1) / pixels.sum(axis=-1))


def reliability_rows(counts: Counts) -> list[dict[str, float | int | None]]:
    """The reliability table of (15, 3) counts: a row a bin; mean probability and accuracy are None where it is empty."""
    return [
        {
            "above": number / BINS,
            "up_to": (number + 1) / BINS,
            "pixels": int(pixels),
            "mean_probability": float(confidence / pixels / 255) if pixels else None,
            "accuracy": float(correct / pixels) if pixels else None,
        }
        for number, (pixels, confidence, correct) in enumerate(counts)
    ]


def draw_reliability(path: Path, splits: Mapping[str, Counts], errors: Mapping[str, float | None]) -> None:
    """Draw accuracy over mean probability, and the share of pixels in each bin, for each split's (15, 3) counts, as PNG.

    `errors` are the ECE that the legend tells. Of several networks, which are drawn together, it is the mean of their own,
    and so more than the drawing shows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    for split, counts in splits.items():
        if not counts[:, 0].any():  # nothing of it is known and examined
            continue
        pixels, confidence, correct = counts[counts[:, 0] > 0].T
        label = f"{split}: ECE {errors[split]:.3f}"
        (line,) = upper.plot(confidence / pixels / 255, correct / pixels, marker="o", markersize=4, label=label)
        lower.stairs(counts[:, 0] / counts[:, 0].sum(), np.linspace(0, 1, BINS + 1), color=line.get_color())
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right", title="How right, by how sure")
    lower.set(xlabel="probability of the class that won", ylabel="share of pixels")
    if upper.get_legend_handles_labels()[1]:
        upper.legend(loc="upper left")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
