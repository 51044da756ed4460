"""`fullfield plan SLIDE --model MODEL`: what segmenting a slide will take."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pipeline import ensemble
from pipeline.cluster import connect
from pipeline.geometry import Mpp
from pipeline.progress import console, facts_table
from pipeline.registry import resolve_model
from pipeline.runtime import require_ability, settled, with_flips
from pipeline.settings import ClusterSettings, EngineSettings, SegmentationSettings
from pipeline.slide import fallback_mpp, open_slide, unused_mpp
from pipeline.stitching import stitching
from pipeline.tasks import values
from pipeline.tiling import GIB, Estimate, foresee, local_workers


def plan(
    path: Path,
    model: str,
    mpp: float | None,
    tile_size: int | None,
    engine: EngineSettings,
    blend: bool,
    flips: bool | None,
    as_json: bool,
) -> None:
    """Estimate in a worker such as `fullfield segment` would start, with the tissue of the model's own run, and print."""
    folder, path = resolve_model(model).absolute(), path.absolute()
    tissue = ensemble.load_tissue(folder)
    mpp, remark = fallback_mpp(path, mpp), unused_mpp(path, mpp)
    open_slide(path, mpp)  # before workers are started for nothing
    spec = ensemble.load_spec(folder)
    stitching(spec, blend)
    engine = with_flips(engine, folder, flips)
    require_ability(settled(engine))
    wanted = SegmentationSettings(tile_size=tile_size, blend=blend)
    workers = local_workers([(path, mpp)], Mpp.square(spec.mpp))
    with connect(ClusterSettings(workers=workers)) as cluster:
        cluster.submit(path, foresee, path, mpp, folder, tissue, wanted, engine, workers)
        (found,) = values(cluster)
    if as_json:
        print(json.dumps({"slide": str(path), "model": str(folder), **asdict(found), "remark": remark or None}, indent=2))
    else:
        console.print(facts_table({**_facts(found), "remark": remark or None}))


def _facts(found: Estimate) -> dict[str, str]:
    return {
        "tile size": f"{found.tile_size} px",
        "cost of halo or overlap": f"{found.halo_cost - 1:.1%} more pixels",
        "tiles with tissue": f"{found.tissue_tiles} of {found.tiles}",
        "pixels": f"{found.pixels / 1e6:.1f} Mpx",
        "time": f"about {found.seconds:.0f} s on {found.workers} worker(s), after start-up",
        "peak memory of a worker, while tiles are run": f"about {found.peak_bytes / GIB:.2f} GiB",
        "output": f"about {found.output_bytes / 2**20:.0f} MiB of OME-Zarr",
    }
