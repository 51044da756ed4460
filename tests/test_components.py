"""Components by runs are those of scikit-image's labelling of pixels, number by number."""

from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage import measure

from pipeline import components
from pipeline.classes import IGNORED
from pipeline.components import find_runs
from pipeline.phantom import render

LABELS = st.sampled_from([0, 1, 7, IGNORED])
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def check(labels: np.ndarray) -> None:
    """At once, and as a large image is looked at: in bands of a few rows."""
    _check(labels)
    with patch.object(components, "_BAND_PIXELS", 2 * labels.shape[1]):
        _check(labels)


def _check(labels: np.ndarray) -> None:
    runs = find_runs(labels)
    truth, count = measure.label(labels, background=IGNORED, connectivity=1, return_num=True)
    assert runs.count == count
    assert np.array_equal(runs.image(labels.shape), truth - 1)
    assert np.array_equal(np.repeat(runs.labels, runs.lengths).reshape(labels.shape), labels)
    assert np.array_equal(runs.starts, np.cumsum(runs.lengths) - runs.lengths)


@given(arrays(np.uint8, SHAPES, elements=LABELS))
def test_any_labels(labels: np.ndarray) -> None:
    check(labels)


def test_a_phantom_and_noise() -> None:
    check(render(3, 301, 257, 2.0, spread=3)[1])
    check(np.random.default_rng(5).integers(0, 3, (200, 301)).astype(np.uint8))
