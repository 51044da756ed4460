"""How many times faster a heat map is than running its classifier patch by patch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.architectures import build_learner
from pipeline.classes import Class, Classes
from pipeline.dense import Classifier, convolutional
from pipeline.network import ModelSpec, activation, normalise

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Tumour", (128, 0, 0))))
SPEC = ModelSpec(architecture="classifier", classes=CLASSES, mpp=0.5, patch_size=128, width=16, depth=4)
SIZE, RUNS, BATCH = 512, 3, 64


@dataclass(frozen=True)
class Speed:
    """Median seconds for one image either way, and the largest difference of probability between the two maps."""

    patchwise_seconds: float
    converted_seconds: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times faster the converted network is."""
        return self.patchwise_seconds / self.converted_seconds


def measure() -> Speed:
    """Both ways in turn over the same pixels in memory, three times, after one run to warm up."""
    torch.manual_seed(0)
    classifier = build_learner(SPEC).eval()
    assert isinstance(classifier, Classifier)
    network = convolutional(classifier).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classifier = classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE + SIZE // 4, 3), np.uint8)
    ways: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: patchwise(classifier, image),
        lambda: activation(network(normalise(image[None], SPEC)))[0],
    )
    with torch.inference_mode():
        maps = [way() for way in ways]
        seconds = [[timed(way) for way in ways] for _ in range(RUNS)]
    slow, fast = (statistics.median(column) for column in zip(*seconds, strict=True))
    return Speed(slow, fast, float((maps[0] - maps[1]).abs().max()))


def timed(way: Callable[[], torch.Tensor]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def patchwise(classifier: Classifier, image: np.ndarray) -> torch.Tensor:
    """The heat map (classes, H / s, W / s) of an image (H, W, 3) with glass around it, in batches of patches."""
    stride, size = 2**SPEC.depth, SPEC.patch_size
    rows, columns = image.shape[0] // stride, image.shape[1] // stride
    framed = np.pad(image, ((classifier.margin,) * 2, (classifier.margin,) * 2, (0, 0)), constant_values=255)
    windows = np.lib.stride_tricks.sliding_window_view(framed, (size, size), axis=(0, 1))[::stride, ::stride]
    patches = windows.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    answers = [
        activation(classifier(normalise(np.ascontiguousarray(patches[start : start + BATCH]), SPEC))[:, :, None, None])
        for start in range(0, len(patches), BATCH)
    ]
    return torch.cat(answers)[:, :, 0, 0].T.reshape(-1, rows, columns)


if __name__ == "__main__":
    found = measure()
    print(
        f"{SIZE + SIZE // 4} x {SIZE} px, patches of {SPEC.patch_size} px every {2**SPEC.depth} px: patch by patch "
        f"{found.patchwise_seconds:.2f} s, converted {found.converted_seconds:.2f} s, {found.ratio:.1f} times faster; "
        f"largest difference {found.difference:.1e}"
    )
