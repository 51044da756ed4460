"""Regions as a file that QuPath opens in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import orjson

from pipeline.classes import Class, Classes
from pipeline.files import replacing
from pipeline.regions import Region

_DECIMALS = 3  # of an area in um2


def write_geojson(
    path: Path, regions: Iterable[Region], classes: Classes, corner: tuple[int, int] = (0, 0)
) -> dict[str, int]:
    """Write regions as a GeoJSON FeatureCollection that QuPath opens in place; `corner` is the pixel that it calls 0, 0.

    Returns how many whole ones there are of each class, by name. The file appears when it is complete.
    """
    counts = dict.fromkeys(classes.names, 0)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        separator = b"\n"
        for region in regions:
            item = classes[region.class_index]
            file.write(separator + orjson.dumps(_feature(region, item, corner), option=orjson.OPT_SERIALIZE_NUMPY))
            separator = b",\n"
            counts[item.name] += not region.part
        file.write(b"\n]}\n")
    return counts


def _feature(region: Region, item: Class, corner: tuple[int, int]) -> dict[str, object]:
    """A region as QuPath reads it: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html."""
    part = {"Part of a larger region": 1} if region.part else {}
    outer, *holes = [ring - np.array(corner, ring.dtype) for ring in region.rings] if any(corner) else region.rings
    # Both run counterclockwise, x to the right and y counted upward; holes are to run the other way (RFC 7946, 3.1.6).
    rings = [outer, *(np.ascontiguousarray(hole[::-1]) for hole in holes)]
    return {
        "type": "Feature",
        "properties": {
            "objectType": "annotation",
            "classification": {"name": item.name, "color": item.color},
            "isLocked": False,
            "measurements": {
                "Area \u00b5m^2": round(region.area_um2, _DECIMALS),
                "Mean probability": round(region.mean_probability, 4),
                **part,
            },
        },
        "geometry": {"type": "Polygon", "coordinates": rings},
    }
