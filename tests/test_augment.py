from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.color import combine_stains, hed2rgb, hed_from_rgb, rgb_from_hed, separate_stains

from pipeline.augment import Augmentation, augment
from pipeline.classes import IGNORED

SIZE = 96
ALL = Augmentation(
    flips=True, rotation_degrees=180, scale=0.15, elastic_px=4, blur_px=1, stain=0.2, tint=0.2, brightness=0.1
)
GEOMETRY = Augmentation(flips=True, rotation_degrees=180, scale=0.15, elastic_px=4)


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose red is each pixel's x and whose green is its y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, 200)], axis=-1).astype(np.uint8)


def stained(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Haematoxylin, eosin and DAB, each of its own smooth density, as RGB."""
    noise = np.random.default_rng(seed).random((height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (4, 4, 0))
    densities = 0.01 + 0.05 * (smooth - smooth.min()) / np.ptp(smooth)
    return np.rint(hed2rgb(densities) * 255).astype(np.uint8)


def draws(image: np.ndarray, mask: np.ndarray, strengths: Augmentation, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [augment(image, mask, np.random.default_rng(seed), strengths, SIZE) for seed in range(count)]


def test_zero_strength_keeps_the_centre() -> None:
    image = coordinates(SIZE + 20, SIZE + 44)
    mask = image[..., 0].copy()
    kept, labels = augment(image, mask, np.random.default_rng(0), Augmentation(), SIZE)
    assert Augmentation().margin(SIZE) == 0
    np.testing.assert_array_equal(kept, image[10 : 10 + SIZE, 22 : 22 + SIZE])
    np.testing.assert_array_equal(labels, mask[10 : 10 + SIZE, 22 : 22 + SIZE])
    assert kept.flags.c_contiguous and labels.flags.c_contiguous and kept.dtype == labels.dtype == np.uint8


def test_flips_are_the_eight_symmetries_alike_for_image_and_mask() -> None:
    image = coordinates(SIZE, SIZE)
    symmetries = [np.rot90(view, turns) for view in (image, image[:, ::-1]) for turns in range(4)]
    counts = np.zeros(8, int)
    for kept, labels in draws(image, image[..., 0], Augmentation(flips=True), 240):
        (which,) = [k for k, symmetry in enumerate(symmetries) if np.array_equal(kept, symmetry)]
        counts[which] += 1
        np.testing.assert_array_equal(labels, kept[..., 0])
    assert counts.min() >= 15, counts


@pytest.mark.parametrize("axis", [0, 1])
def test_mask_comes_from_the_same_place_as_the_image(axis: int) -> None:
    margin = GEOMETRY.margin(SIZE)
    image = coordinates(SIZE + 2 * margin + 6, SIZE + 2 * margin + 20)
    mask = image[..., axis].copy()
    for kept, labels in draws(image, mask, GEOMETRY, 30):
        assert np.abs(kept[..., axis].astype(int) - labels).max() <= 1


def test_mask_holds_no_value_that_was_not_there() -> None:
    margin = GEOMETRY.margin(SIZE)
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).random((SIZE + 2 * margin, SIZE + 2 * margin + 8)), 5) > 0.5
    mask = np.where(blobs, 7, 2).astype(np.uint8)
    image = np.repeat(np.where(blobs, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    for kept, labels in draws(image, mask, GEOMETRY, 30):
        assert set(np.unique(labels)) <= {2, 7}
        clear = (kept[..., 0] == 0) | (kept[..., 0] == 255)
        assert clear.mean() > 0.6
        np.testing.assert_array_equal(labels[clear], np.where(kept[clear][:, 0] == 255, 7, 2))


def test_rotation_and_scale_keep_to_their_bounds_and_reach_them() -> None:
    strengths = Augmentation(rotation_degrees=20, scale=0.25)
    margin = strengths.margin(SIZE)
    image = coordinates(SIZE + 2 * margin, SIZE + 2 * margin + 10)
    angles, factors = [], []
    for kept, _ in draws(image, image[..., 0], strengths, 150):
        places = kept[..., :2].astype(float)
        along_x = (places[SIZE // 2, -1] - places[SIZE // 2, 0]) / (SIZE - 1)
        along_y = (places[-1, SIZE // 2] - places[0, SIZE // 2]) / (SIZE - 1)
        angles += [np.degrees(np.arctan2(along_x[1], along_x[0])), np.degrees(np.arctan2(-along_y[0], along_y[1]))]
        factors += [np.hypot(*along_x), np.hypot(*along_y)]
        centre = (np.array(image.shape[1::-1]) - 1) / 2
        middle = places[SIZE // 2 - 1 : SIZE // 2 + 1, SIZE // 2 - 1 : SIZE // 2 + 1].mean(axis=(0, 1))
        assert np.abs(middle - centre).max() <= 0.6
    slack = 1.2  # degrees: coordinates are whole numbers
    assert -20 - slack <= min(angles) < -17 and 17 < max(angles) <= 20 + slack
    assert 0.79 <= min(factors) < 0.84 and 1.2 < max(factors) <= 1.26


def test_elastic_is_smooth_bounded_and_not_a_shift() -> None:
    strengths = Augmentation(elastic_px=8)
    margin = strengths.margin(SIZE)
    image = coordinates(SIZE + 2 * margin, SIZE + 2 * margin + 10)
    rest, _ = augment(image, image[..., 0], np.random.default_rng(0), Augmentation(), SIZE)
    for kept, _ in draws(image, image[..., 0], strengths, 20):
        shift = kept[..., :2].astype(int) - rest[..., :2]
        assert np.abs(shift).max() <= 9
        assert np.ptp(shift[..., 0]) >= 2 and np.ptp(shift[..., 1]) >= 2
        assert np.ptp(shift[..., 0] - shift[..., 1]) >= 3, "both axes alike"
        assert np.diff(kept[..., 0].astype(int), axis=1).min() >= 0, "folded along x"
        assert np.diff(kept[..., 1].astype(int), axis=0).min() >= 0, "folded along y"


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Augmentation,
        flips=st.booleans(),
        rotation_degrees=st.floats(0, 180),
        scale=st.floats(0, 0.89),
        elastic_px=st.floats(0, 20),
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from([31, 64, 96]),
)
def test_margin_is_enough(strengths: Augmentation, seed: int, size: int) -> None:
    side = size + 2 * strengths.margin(size)
    image, mask = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
    kept, labels = augment(image, mask, np.random.default_rng(seed), strengths, size)
    assert kept.max() == 0 and labels.max() == 0


def test_beyond_a_patch_without_margin_is_glass_of_which_nothing_is_known() -> None:
    image, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.ones((SIZE, SIZE), np.uint8)
    outcomes = draws(image, mask, Augmentation(rotation_degrees=45), 10)
    assert max((labels == IGNORED).mean() for _, labels in outcomes) > 0.1
    for kept, labels in outcomes:
        assert set(np.unique(labels)) <= {1, IGNORED}
        far = ndimage.binary_erosion(labels == IGNORED, iterations=2, border_value=1)
        assert (kept[far] == 255).all()


def test_stains_grow_and_fade_as_skimage_would_have_them() -> None:
    image = stained(SIZE + 8, SIZE)
    mask = np.zeros(image.shape[:2], np.uint8)
    before = separate_stains(image[4:-4] / 255, hed_from_rgb)
    seen = []
    for kept, labels in draws(image, mask, Augmentation(stain=0.2), 12):
        after = separate_stains(kept / 255, hed_from_rgb)
        factors = (before * after).sum(axis=(0, 1)) / (before**2).sum(axis=(0, 1))
        seen.append(factors)
        expected = combine_stains(before * factors, rgb_from_hed) * 255
        assert np.abs(kept - expected).max() < 1.6, "more than rounding"
        assert labels.max() == 0
    assert np.min(seen) > 1 / 1.2 - 0.01 and np.max(seen) < 1.2 + 0.01
    assert np.std(seen, axis=0).min() > 0.05, "every stain varies"
    assert np.abs(np.corrcoef(np.array(seen).T)[np.triu_indices(3, 1)]).max() < 0.8, "each for itself"


def test_stain_leaves_glass_alone() -> None:
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for kept, _ in draws(image, image[..., 0], Augmentation(stain=0.5), 10):
        assert (kept == 255).all()


def test_tint_multiplies_the_density_of_each_colour() -> None:
    image = np.maximum(stained(SIZE + 4, SIZE), 60)
    density, factors = -np.log(image[2:-2] / 255), []
    for kept, _ in draws(image, image[..., 0], Augmentation(tint=0.3), 30):
        seen = (-np.log(np.maximum(kept, 1) / 255) * density).sum(axis=(0, 1)) / (density**2).sum(axis=(0, 1))
        assert np.abs(255 * np.exp(-density * seen) - kept).max() <= 1.6, "more than rounding"
        factors.append(seen)
    assert np.min(factors) > 1 / 1.3 - 0.01 and np.max(factors) < 1.3 + 0.01
    assert np.std(factors, axis=0).min() > 0.05, "every colour varies"
    assert np.abs(np.corrcoef(np.array(factors).T)[np.triu_indices(3, 1)]).max() < 0.8, "each for itself"


def test_brightness_multiplies_the_light() -> None:
    image = stained(SIZE, SIZE)
    image[0, 0] = 255
    lights = []
    for kept, _ in draws(image, image[..., 0], Augmentation(brightness=0.3), 30):
        light = (kept.astype(float) * (kept < 255)).sum() / (image.astype(float) * (kept < 255)).sum()
        assert np.abs(np.minimum(image * light, 255) - kept).max() <= 1.1
        lights.append(light)
    assert 1 / 1.31 < min(lights) < 0.85 and 1.15 < max(lights) < 1.31


def test_blur_is_a_gaussian_of_the_image_alone() -> None:
    image, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    image[:, SIZE // 2], mask[:, SIZE // 2] = 250, 1
    sigmas = []
    for kept, labels in draws(image, mask, Augmentation(blur_px=3), 30):
        np.testing.assert_array_equal(labels, mask)
        profile = kept[SIZE // 2, :, 0].astype(float)
        assert profile.sum() == pytest.approx(250, abs=12)
        sigmas.append(np.sqrt((profile * (np.arange(SIZE) - SIZE // 2) ** 2).sum() / profile.sum()))
    assert min(sigmas) < 0.5 and 2.5 < max(sigmas) < 3.1


def test_the_generator_alone_decides() -> None:
    margin = ALL.margin(SIZE)
    image = stained(SIZE + 2 * margin, SIZE + 2 * margin + 4)
    mask = image[..., 1].copy()
    before = image.copy()
    once = draws(image, mask, ALL, 5)
    again = draws(image, mask, ALL, 5)
    for (kept, labels), (kept_again, labels_again) in zip(once, again, strict=True):
        np.testing.assert_array_equal(kept, kept_again)
        np.testing.assert_array_equal(labels, labels_again)
    assert not np.array_equal(once[0][0], once[1][0])
    np.testing.assert_array_equal(image, before)


def test_one_strength_changed_leaves_the_other_draws_alone() -> None:
    margin = ALL.margin(SIZE)
    image = coordinates(SIZE + 2 * margin, SIZE + 2 * margin + 4)
    mask = image[..., 0].copy()
    for (_, labels), (_, alike) in zip(draws(image, mask, ALL, 5), draws(image, mask, GEOMETRY, 5), strict=True):
        np.testing.assert_array_equal(labels, alike)


def test_a_patch_that_is_too_small_is_refused() -> None:
    image, mask = np.zeros((SIZE, SIZE - 1, 3), np.uint8), np.zeros((SIZE, SIZE - 1), np.uint8)
    with pytest.raises(ValueError, match="at least 96 px"):
        augment(image, mask, np.random.default_rng(0), ALL, SIZE)
