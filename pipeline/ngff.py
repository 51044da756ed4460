"""What an OME-NGFF 0.5 image says of itself, as the JSON that viewers read (https://ngff.openmicroscopy.org/0.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.classes import IGNORED, Class, Classes
from pipeline.geometry import Lattice, Mpp

_VERSION = "0.5"


def image_metadata(levels: Sequence[Lattice], classes: Classes, slide_mpp: Mpp) -> dict[str, Any]:
    """The `ome` attribute of a pyramid of probabilities (c, y, x), one channel a class, 0 to 255.

    Its levels lie on a slide of `slide_mpp` at full resolution.
    """
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [{"label": item.name, "color": item.hex_color[1:], "active": True, "window": window} for item in classes]
    return {
        "version": _VERSION,
        "multiscales": [_multiscale(levels, "probabilities", slide_mpp, channels=True)],
        "omero": {"channels": channels, "rdefs": {"model": "color"}},
    }


def label_metadata(levels: Sequence[Lattice], classes: Classes, slide_mpp: Mpp) -> dict[str, Any]:
    """The `ome` attribute of a pyramid of class indices (y, x) in the `labels` of an image; IGNORED is clear.

    Its levels lie on a slide of `slide_mpp` at full resolution.
    """
    colors = [(*item.color, 255) for item in classes] + [(0, 0, 0, 0)]
    names = [*classes.names, "not examined"]
    values = [*range(len(classes)), IGNORED]
    label = {
        "version": _VERSION,
        "colors": [{"label-value": value, "rgba": color} for value, color in zip(values, colors, strict=True)],
        "properties": [{"label-value": value, "name": name} for value, name in zip(values, names, strict=True)],
        "source": {"image": "../../"},
    }
    return {
        "version": _VERSION,
        "multiscales": [_multiscale(levels, "classes", slide_mpp, channels=False)],
        "image-label": label,
    }


def read_image_metadata(ome: dict[str, Any]) -> tuple[Mpp, Classes]:
    """The scale and the classes that `image_metadata` wrote. Raises LookupError, TypeError or ValueError for others."""
    _, y, x = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    channels = ome["omero"]["channels"]
    return Mpp(x, y), Classes(tuple(Class.of_hex(channel["label"], channel["color"]) for channel in channels))


def _multiscale(levels: Sequence[Lattice], name: str, slide_mpp: Mpp, channels: bool) -> dict[str, Any]:
    """Axes and levels. Positions are those of pixel centres, from that of the slide's first pixel: a coarser level's first
    pixel lies further inward.
    """
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] if channels else []
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    datasets = []
    for index, level in enumerate(levels):
        scale = [level.mpp.y, level.mpp.x]
        shift = [(level.mpp.y - slide_mpp.y) / 2, (level.mpp.x - slide_mpp.x) / 2]
        transformations = [
            {"type": "scale", "scale": [1.0, *scale] if channels else scale},
            {"type": "translation", "translation": [0.0, *shift] if channels else shift},
        ]
        datasets.append({"path": str(index), "coordinateTransformations": transformations})
    return {"name": name, "axes": axes, "datasets": datasets}
