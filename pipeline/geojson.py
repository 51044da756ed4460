"""Regions as a file that QuPath opens in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import orjson

from pipeline.classes import Class, Classes
from pipeline.files import replacing
from pipeline.regions import Region

_DECIMALS = 3  # of an area in um2


def write_geojson(path: Path, regions: Iterable[Region], classes: Classes) -> dict[str, int]:
    """Write regions as a GeoJSON FeatureCollection that QuPath opens in place.

    Returns how many there are of each class, by name. The file appears when it is complete.
    """
    counts = dict.fromkeys(classes.names, 0)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        separator = b"\n"
        for region in regions:
            item = classes[region.class_index]
            file.write(separator + orjson.dumps(_feature(region, item), option=orjson.OPT_SERIALIZE_NUMPY))
            separator = b",\n"
            counts[item.name] += 1
        file.write(b"\n]}\n")
    return counts


def _feature(region: Region, item: Class) -> dict[str, object]:
    """A region as QuPath reads it: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html."""
    return {
        "type": "Feature",
        "properties": {
            "objectType": "annotation",
            "classification": {"name": item.name, "color": item.color},
            "isLocked": False,
            "measurements": {
                "Area \u00b5m^2": round(region.area_um2, _DECIMALS),
                "Mean probability": round(region.mean_probability, 4),
            },
        },
        "geometry": {"type": "Polygon", "coordinates": region.rings},
    }
