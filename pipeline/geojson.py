"""Regions as a file that QuPath opens in place."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import orjson

from pipeline.classes import Class, Classes
from pipeline.contours import DECIMALS
from pipeline.files import replacing
from pipeline.regions import Region

_AREA_DECIMALS = 3  # in um2
_SEPARATOR = b",\n"


def write_features(
    path: Path, regions: Iterable[Region], classes: Classes, corner: tuple[int, int] = (0, 0)
) -> dict[str, int]:
    """Write regions as features with commas between them, for `write_geojson` to put together.

    `corner` is the pixel that QuPath calls 0, 0. Returns how many whole ones there are of each class, by name. The file
    appears when it is complete.
    """
    counts = dict.fromkeys(classes.names, 0)
    with replacing(path) as partial, partial.open("wb") as file:
        for region in regions:
            item = classes[region.class_index]
            feature = orjson.dumps(_feature(region, item, corner), option=orjson.OPT_SERIALIZE_NUMPY)
            file.write(_SEPARATOR + feature if file.tell() else feature)
            counts[item.name] += not region.part
    return counts


def write_geojson(path: Path, features: Iterable[Path]) -> None:
    """Put files of `write_features` together as a GeoJSON FeatureCollection; the file appears when it is complete."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        separator = b"\n"
        for part in features:
            if part.stat().st_size:
                file.write(separator)
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file)
                separator = _SEPARATOR
        file.write(b"\n]}\n")


def _feature(region: Region, item: Class, corner: tuple[int, int]) -> dict[str, object]:
    """A region as QuPath reads it: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html."""
    part = {"Part of a larger region": 1} if region.part else {}
    outer, *holes = [_from(corner, ring) for ring in region.rings] if any(corner) else region.rings
    # Both run counterclockwise, x to the right and y counted upward; holes are to run the other way (RFC 7946, 3.1.6).
    rings = [outer, *(np.ascontiguousarray(hole[::-1]) for hole in holes)]
    return {
        "type": "Feature",
        "properties": {
            "objectType": "annotation",
            "classification": {"name": item.name, "color": item.color},
            "isLocked": False,
            "measurements": {
                "Area \u00b5m^2": round(region.area_um2, _AREA_DECIMALS),
                "Mean probability": round(region.mean_probability, 4),
                **part,
            },
        },
        "geometry": {"type": "Polygon", "coordinates": rings},
    }


def _from(corner: tuple[int, int], ring: np.ndarray) -> np.ndarray:
    """A ring counted from a corner; a difference of rounded numbers is not rounded."""
    return np.asarray(np.round(ring - np.array(corner, ring.dtype), DECIMALS))
