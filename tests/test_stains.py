"""Dyes are told from pixels whose dyes are known, as MONAI tells them; mixing is held against its formula."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.staining import METHODS, Normalisation, Staining
from pipeline.stains import reference, restained, staining_of

LIGHT = np.array([243.0, 238.0, 246.0])
BLUE, PINK = np.array([0.62, 0.70, 0.35]), np.array([0.15, 0.85, 0.45])
OTHER = Normalisation("macenko", ((0.9, 1.1, 0.4), (0.25, 1.0, 0.35)))
FOUND = Staining((243.0, 238.0, 246.0), ((1.1, 1.2, 0.6), (0.2, 0.9, 0.5)))


def unit(dye: np.ndarray) -> np.ndarray:
    return dye / np.linalg.norm(dye)


def drawn(amounts: np.ndarray, dyes: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Pixels of known dyes: (n, dyes) and (dyes, 3) to (n, 3) uint8."""
    return np.rint(light * np.exp(-amounts @ dyes)).astype(np.uint8)


def amounts(count: int) -> np.ndarray:
    """(count, 2), of which a tenth are all but one dye."""
    rng = np.random.default_rng(0)
    found = rng.uniform(0.4, 1.6, (count, 2))
    found[: count // 20, 0] = found[count // 20 : count // 10, 1] = 0
    return found


def degrees(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(unit(first) @ unit(second), -1, 1))))


def by_formula(image: np.ndarray, found: Staining, wanted: Normalisation) -> np.ndarray:
    """What each pixel holds of both dyes, and of what is at right angles to them, and the same of the reference's."""

    def basis(dyes: tuple[tuple[float, float, float], ...]) -> np.ndarray:
        return np.array([*dyes, unit(np.cross(dyes[0], dyes[1]))]) if len(dyes) == 2 else np.array(dyes)

    density = np.maximum(-np.log(np.maximum(image, 0.5) / np.array(found.light)), 0)
    held = np.linalg.solve(basis(found.dyes).T, density.reshape(-1, 3).T)
    return np.clip(255 * np.exp(-(basis(wanted.dyes).T @ held).T.reshape(image.shape)), 0, 255)


def test_macenko_finds_the_dyes_and_how_strong_they_are() -> None:
    dyes = np.stack([unit(BLUE), unit(PINK)])
    found = staining_of(drawn(amounts(20_000), dyes, LIGHT), LIGHT, "macenko")
    assert found.light == tuple(LIGHT) and not found.problem
    for dye, true, held in zip(np.array(found.dyes), dyes, amounts(20_000).T, strict=True):
        assert degrees(dye, true) < 1.5
        assert np.linalg.norm(dye) == pytest.approx(np.percentile(held, 99), rel=0.05)


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1)])
def test_macenko_does_not_depend_on_the_signs_of_eigenvectors(
    monkeypatch: pytest.MonkeyPatch, signs: tuple[int, int]
) -> None:
    """Which way an eigenvector points is up to the library, and to the processor."""
    first, noise = np.random.default_rng(1).uniform([[0.2], [-0.1]], [[1.4], [0.1]], (2, 20_000))
    pixels = drawn(np.stack([first, 1.6 - first + noise], axis=1), np.stack([unit(BLUE), unit(PINK)]), LIGHT)
    expected, eigh = staining_of(pixels, LIGHT, "macenko"), np.linalg.eigh

    def turned(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = eigh(matrix)
        return values, vectors * np.array([1, *signs])

    monkeypatch.setattr("pipeline.stains.np.linalg.eigh", turned)
    found = staining_of(pixels, LIGHT, "macenko")
    assert not found.problem
    np.testing.assert_allclose(found.dyes, expected.dyes, atol=1e-4)


def test_reinhard_finds_the_mean_of_every_colour() -> None:
    held = amounts(20_000) @ np.stack([unit(BLUE), unit(PINK)])
    found = staining_of(drawn(amounts(20_000), np.stack([unit(BLUE), unit(PINK)]), LIGHT), LIGHT, "reinhard")
    expected = held[(held > 0.15).all(axis=1)].mean(axis=0)
    np.testing.assert_allclose(np.array(found.dyes), np.diag(expected), atol=0.01)


def test_macenko_is_monais_but_that_haematoxylin_comes_first() -> None:
    """MONAI 1.6 puts eosin first, though its reference has haematoxylin there; it is given ours in its own order."""
    from monai.apps.pathology.transforms.stain.array import ExtractHEStains, NormalizeHEStains

    light, dyes = np.full(3, 240.0), np.stack([unit(BLUE), unit(PINK)])
    image = drawn(amounts(40_000) * 0.8 + 0.3, dyes, light).reshape(160, 250, 3)
    found = staining_of(image.reshape(-1, 3), light, "macenko")
    for dye, same in zip(found.dyes, ExtractHEStains(tli=240)(image).T[::-1], strict=True):
        assert degrees(np.array(dye), same) < 1
    target = np.array(OTHER.dyes)[::-1]
    lengths = np.linalg.norm(target, axis=1)
    theirs = NormalizeHEStains(tli=240, target_he=(target / lengths[:, None]).T, max_cref=lengths)(image)
    assert np.abs(restained(image, found, OTHER) / 255 - theirs / 240).mean() < 1.5 / 255
    assert np.abs(image / 255 - theirs / 240).mean() > 10 / 255, "they had something to do"


@pytest.mark.parametrize("wanted", [OTHER, Normalisation("reinhard", ((0.5, 0, 0), (0, 0.9, 0), (0, 0, 0.4)))])
def test_every_pixel_is_mixed_by_the_formula_and_by_itself(wanted: Normalisation) -> None:
    image = np.random.default_rng(1).integers(0, 256, (67, 1031, 3), dtype=np.uint8)
    found = FOUND if wanted is OTHER else replace(FOUND, dyes=((0.4, 0, 0), (0, 0.7, 0), (0, 0, 0.6)))
    whole = restained(image, found, wanted)
    assert np.abs(whole - by_formula(image, found, wanted)).max() < 1.2, "more than rounding"
    for rows, columns in ((slice(0, 1), slice(3, 998)), (slice(13, 67), slice(1030, 1031)), (slice(5, 30), slice(7, 20))):
        np.testing.assert_array_equal(restained(image[rows, columns], found, wanted), whole[rows, columns])


@pytest.mark.parametrize("method", METHODS)
def test_glass_becomes_white_and_white_stays_white(method: str) -> None:
    pixels = drawn(amounts(20_000), np.stack([unit(BLUE), unit(PINK)]), LIGHT)
    found = staining_of(pixels, LIGHT, method)
    wanted = reference([found, replace(found, dyes=tuple(tuple(1.3 * x for x in dye) for dye in found.dyes))], method)
    assert wanted is not None
    for glass in (LIGHT.astype(np.uint8), np.full(3, 255, np.uint8)):
        assert (restained(np.tile(glass, (4, 5, 1)), found, wanted) == 255).all()
    assert restained(pixels[None], found, wanted).mean() < pixels.mean(), "stains are stronger"


def grey() -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.clip(rng.uniform(40, 230, (20_000, 1)) + rng.normal(0, 2, (20_000, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("pixels", "word"),
    [
        (np.empty((0, 3), np.uint8), "only 0 stained pixels"),
        (np.full((9000, 3), 241, np.uint8), "only 0 stained pixels"),
        (np.full((9000, 3), 90, np.uint8), "no two dyes"),
        (np.tile(np.array([120, 60, 140], np.uint8), (9000, 1)), "no two dyes"),
        (grey(), "no two dyes"),
    ],
    ids=["none", "glass", "one grey", "one colour", "greys"],
)
def test_where_dyes_cannot_be_told_the_image_is_left_alone(pixels: np.ndarray, word: str) -> None:
    found = staining_of(pixels, LIGHT, "macenko")
    assert not found.dyes and word in found.problem
    image = np.random.default_rng(3).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    np.testing.assert_array_equal(restained(image, found, OTHER), image)


def test_the_reference_is_the_mean_of_those_that_could_be_told() -> None:
    twice = replace(FOUND, dyes=tuple(tuple(2 * value for value in dye) for dye in FOUND.dyes))
    untold = Staining(FOUND.light, (), "too little")
    found = reference([FOUND, untold, twice], "macenko")
    assert found is not None and found.method == "macenko"
    np.testing.assert_allclose(found.dyes, 1.5 * np.array(FOUND.dyes))
    assert reference([untold], "macenko") is None


def test_a_staining_comes_back_from_json() -> None:
    for item in (FOUND, Staining(FOUND.light, (), "too little")):
        assert Staining.from_dict(json.loads(json.dumps(item.to_dict()))) == item
