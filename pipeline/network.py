"""What a model is (ModelSpec), what its network takes and what its answer means; `architectures` builds the network.

Importing this module imports neither torch nor MONAI.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from pipeline.classes import Class, Classes
from pipeline.errors import NetworkError
from pipeline.geometry import MPP_RANGE
from pipeline.staining import METHODS, Normalisation

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Family:
    """What can be chosen about an architecture; of several ways the first is the default."""

    depths: tuple[int, ...]
    downsample: tuple[str, ...]
    upsample: tuple[str, ...]
    encoders: tuple[str, ...] = ()
    residual_units: tuple[int, ...] = ()
    norms: tuple[str, ...] = ("batch",)


_RESNETS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")
FAMILIES = {
    "fcn": Family((1, 2, 3, 4, 5, 6), ("pool", "stride"), ("nearest", "transpose")),
    "heatmap": Family((1, 2, 3, 4, 5, 6), ("pool", "stride"), ()),
    "classifier": Family((1, 2, 3, 4, 5, 6), ("pool",), ()),
    "unet": Family((1, 2, 3, 4, 5, 6), ("stride",), ("transpose",), residual_units=(2, 1, 0), norms=("batch", "instance")),
    # Its other upsampling depends on the image's size.
    "basic_unet": Family((4,), ("pool",), ("transpose",), norms=("batch", "instance")),
    "flexible_unet": Family((5,), (), ("nearest", "transpose"), _RESNETS),
}
_ADDED = {"norm", "normalisation"}  # keys that the first models were written without; each means there what None means


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All there is to know about a model but its weights. Raises NetworkError where the values do not fit together.

    `architecture` is one of

    - `fcn`: encoder and decoder of 3x3 convolutions, joined by addition at each level;
    - `heatmap`: that encoder and 1x1 convolutions, with one answer for every 2**depth x 2**depth pixels;
    - `classifier`: what learns to tell the class at the centre of a patch, with unpadded convolutions and dense layers, made
      convolutional: one answer for every 2**depth x 2**depth pixels, from the `patch_size` pixels around;
    - `unet`, `basic_unet`, `flexible_unet`: MONAI's networks of these names, the last with a ResNet `encoder`.

    `width` counts the channels at full size, `depth` the halvings. `downsample` ("pool", "stride") and `upsample`
    ("nearest", "transpose") may stay None: the architecture's own way, as may a unet's `residual_units`, the convolutions of
    a level: 2, 1, or 0 for a plain one. `norm` None is batch norm; a unet and a basic_unet may have "instance" norm, which
    looks at the whole image that it is given, so that the network is not local. `mpp` is in micrometres per pixel,
    `patch_size` in pixels of that mpp, and so are `stride`, `halo` and `output_stride`, which `footprint.with_footprint`
    measures. `halo` None says that no halo is enough: the network is not local, and can be blended but not tiled exactly.
    `rest` is the index of the class that stands for everything else, of which no regions are drawn; None: there is none.
    RGB enters as (value / 255 - mean) / std, of slides that had their stain made that of `normalisation`; None: as scanned.
    """

    architecture: str
    classes: Classes
    mpp: float
    patch_size: int
    width: int
    depth: int
    downsample: str | None = None
    upsample: str | None = None
    encoder: str | None = None
    residual_units: int | None = None
    norm: str | None = None
    rest: int | None = None
    stride: int = 1
    halo: int | None = 0
    output_stride: int = 1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        _check_family(self)
        _check_numbers(self)
        _check_norm(self)
        _check_footprint(self)
        if self.architecture == "classifier":
            _check_classifier(self)

    @property
    def glass(self) -> tuple[float, float, float]:
        """White as it enters the network: red, green and blue."""
        red, green, blue = ((1 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))
        return red, green, blue

    def required_halo(self) -> int:
        """The halo with which tiles are exact. Raises NetworkError for a network that is not local, which has none."""
        if self.halo is None:
            found = f"a network that looks at the whole image at once, with {self.norm} norm"
            remedy = "Say --blend (segmentation.blend=true) to blend overlapping windows, or train one with batch norm."
            raise NetworkError(f"exact tiling, {self.architecture}", found, "one that looks no further than a halo", remedy)
        return self.halo

    def to_dict(self) -> dict[str, object]:
        """The spec as plain values that YAML can hold."""
        classes = [{"name": item.name, "color": list(item.color)} for item in self.classes]
        listed = {"classes": classes, "mean": list(self.mean), "std": list(self.std)}
        if self.normalisation is not None:
            first, *others = ([list(dye) for dye in one.dyes] for one in self.normalisation.each)
            more = {"dyes_of_others": others} if others else {}
            listed["normalisation"] = {"method": self.normalisation.method, "dyes": first, **more}
        return {**asdict(self), **listed}

    @classmethod
    def from_dict(cls, values: object) -> ModelSpec:
        """The spec that `to_dict` wrote, of a single model: an ensemble's is not read.

        Raises NetworkError on unknown, missing or impossible values.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise _wrong("", type(values).__name__, "keys and values", "Use a model.yaml as Fullfield wrote it.")
        unlike = sorted((set(names) ^ set(values)) - (_ADDED - set(values)), key=str)
        if unlike:
            found = ", ".join(f"{'no' if key in names else 'unknown'} key `{key}`" for key in unlike)
            raise _wrong("", found, f"the keys {', '.join(names)}", "Use the version of Fullfield that wrote it.")
        listed = {key: _tuple(key, values[key]) for key in ("mean", "std")}
        parsed = {"classes": _classes(values["classes"]), "normalisation": _normalisation(values.get("normalisation"))}
        return cls(**{**values, **listed, **parsed})


def activation(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities, 0 to 1, of (N, C, H, W) logits: softmax over the classes, or a sigmoid where there is only one."""
    return logits.softmax(dim=1) if logits.shape[1] > 1 else logits.sigmoid()


def normalise(images: np.ndarray[Any, Any] | torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """RGB images, (N, H, W, 3) uint8, as the network wants them: (N, 3, H, W) float32, channels_last in memory."""
    import torch

    pixels = torch.as_tensor(images)
    count, height, width, _ = pixels.shape
    scale = torch.tensor([1 / (255 * std) for std in spec.std], device=pixels.device)
    shift = torch.tensor([-mean / std for mean, std in zip(spec.mean, spec.std, strict=True)], device=pixels.device)
    # Whole rows at once: an innermost axis of three values would take four times as long.
    rows = pixels.reshape(count, height, width * 3).to(torch.float32)
    rows = rows.mul_(scale.repeat(width)).add_(shift.repeat(width))
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)


def _check_family(spec: ModelSpec) -> None:
    family = FAMILIES.get(spec.architecture) if isinstance(spec.architecture, str) else None
    if family is None:
        raise _wrong("architecture", repr(spec.architecture), f"one of {', '.join(FAMILIES)}", "Choose one of these.")
    choices: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("depth", family.depths),
        ("downsample", (None, *family.downsample)),
        ("upsample", (None, *family.upsample)),
        ("encoder", family.encoders or (None,)),
        ("residual_units", (None, *family.residual_units)),
        ("norm", (None, *family.norms)),
    )
    for key, allowed in choices:
        value = getattr(spec, key)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            expected = " or ".join("null" if choice is None else str(choice) for choice in allowed)
            remedy = f"Leave `{key}` out, or null." if allowed == (None,) else f"Set `{key}` to one of these."
            raise _wrong(key, repr(value), f"{expected} for {spec.architecture}", remedy)


def _check_numbers(spec: ModelSpec) -> None:
    for key, least in (("patch_size", 1), ("width", 1), ("stride", 1), ("halo", 0), ("output_stride", 1)):
        value = getattr(spec, key)
        if key == "halo" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _wrong(key, repr(value), f"a whole number from {least} up", f"Correct `{key}`.")
    if spec.rest is not None and (type(spec.rest) is not int or not 0 <= spec.rest < len(spec.classes)):
        expected = f"null, or the index of a class, 0 to {len(spec.classes) - 1}"
        raise _wrong("rest", repr(spec.rest), expected, "Correct `rest`.")
    low, high = MPP_RANGE
    if not _is_number(spec.mpp) or not low <= spec.mpp <= high:
        raise _wrong("mpp", repr(spec.mpp), f"{low:g} to {high:g} micrometres per pixel", "Correct `mpp`.")
    for key in ("mean", "std"):
        value = getattr(spec, key)
        if not isinstance(value, tuple) or len(value) != 3 or not all(_is_number(item) for item in value):
            raise _wrong(key, repr(value), "three numbers, for red, green and blue", f"Correct `{key}`.")
    if min(spec.std) <= 0:
        raise _wrong("std", repr(spec.std), "numbers above 0", "Correct `std`.")
    smallest = 2**spec.depth
    if spec.patch_size % smallest:
        nearest = max(round(spec.patch_size / smallest), 1) * smallest
        expected = f"a multiple of {smallest}, as the image is halved {spec.depth} times"
        raise _wrong("patch_size", str(spec.patch_size), expected, f"Set `patch_size` to {nearest}, say.")


def _check_norm(spec: ModelSpec) -> None:
    """What is not local has no halo, and all else has one; instance norm needs more than one value to work with."""
    instance = spec.norm == "instance"
    if instance != (spec.halo is None):
        expected = "no halo for instance norm, and one for any other"
        raise _wrong("halo", f"{spec.halo} with norm {spec.norm}", expected, "Leave both as `fullfield train` wrote them.")
    least = 2 ** (spec.depth + 1)
    if instance and spec.patch_size < least:
        expected = f"{least} or more, as instance norm needs more than one pixel at depth {spec.depth}"
        raise _wrong("patch_size", str(spec.patch_size), expected, f"Set `patch_size` to {least} or more, or `depth` lower.")


def _check_footprint(spec: ModelSpec) -> None:
    if (spec.halo or 0) % spec.stride or spec.stride % spec.output_stride:
        found = f"halo {spec.halo}, stride {spec.stride}, output_stride {spec.output_stride}"
        expected = "a halo of whole strides, and a stride of whole output_strides"
        raise _wrong("halo", found, expected, "Measure them with `with_footprint`.")


def _check_classifier(spec: ModelSpec) -> None:
    """Two unpadded 3x3 convolutions take 4 pixels before each halving."""
    size, least = spec.patch_size, 1
    for _ in range(spec.depth):
        size, least = (size - 4) // 2, 2 * least + 4
    if size < 1:
        found, whole = f"{spec.patch_size} for depth {spec.depth}", -(-least // 2**spec.depth) * 2**spec.depth
        expected = f"{whole} or more, so that the unpadded convolutions of a classifier leave something"
        raise _wrong("patch_size", found, expected, f"Set `patch_size` to {whole} or more, or `depth` lower.")
    if max(spec.glass) - min(spec.glass) > 1e-6:
        expected = "white that is alike in red, green and blue, as a classifier is surrounded by one value"
        raise _wrong("mean", f"{spec.mean} with std {spec.std}", expected, "Make (1 - mean) / std alike for all three.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _tuple(key: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(key, repr(value), "a list", f"Correct `{key}`.")
    return tuple(value)


def _classes(value: object) -> Classes:
    items = []
    for item in _tuple("classes", value):
        if not isinstance(item, Mapping) or set(item) != {"name", "color"} or not isinstance(item["name"], str):
            raise _wrong("classes", repr(item), "a name and a color", "Correct this class.")
        color = _tuple("classes.color", item["color"])
        if len(color) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in color):
            raise _wrong("classes.color", repr(color), "red, green and blue, 0 to 255", "Correct this color.")
        items.append(Class(item["name"], (color[0], color[1], color[2])))
    try:
        return Classes(tuple(items))
    except ValueError as error:
        raise _wrong("classes", str(error), "classes with different names", "Correct the classes.") from error


def _normalisation(value: object) -> Normalisation | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or set(value) != {"method", "dyes"} or value["method"] not in METHODS:
        expected = f"null, or a method ({', '.join(METHODS)}) and dyes"
        raise _wrong("normalisation", repr(value), expected, "Correct `normalisation`.")
    dyes = tuple(_tuple("normalisation.dyes", dye) for dye in _tuple("normalisation.dyes", value["dyes"]))
    if len(dyes) not in (2, 3) or not all(len(dye) == 3 and all(map(_is_number, dye)) for dye in dyes):
        expected = "two or three dyes, each the densities of red, green and blue"
        raise _wrong("normalisation.dyes", repr(value["dyes"]), expected, "Correct `normalisation.dyes`.")
    return Normalisation(value["method"], dyes)


def _wrong(key: str, found: str, expected: str, remedy: str) -> NetworkError:
    return NetworkError(f"model spec, `{key}`" if key else "model spec", found, expected, remedy)
