"""Segments a slide with pyFAST, in the interpreter that has it; this file imports nothing of Fullfield.

    PYTHON benchmarks/pyfast_segmentation.py SLIDE ONNX OUTPUT.tiff PATCH tissue|all

Prints the seconds since the library was imported, as JSON.
"""

import json
import sys
import time

import fast

_LEAST_TISSUE = 0.01  # of a patch, as near as can be to any tissue at all


def segment(slide: str, model: str, output: str, patch: int, tissue_only: bool) -> None:
    """Patches side by side, as pyFAST's own examples do it; the label of highest probability, as a pyramidal TIFF."""
    importer = fast.WholeSlideImageImporter.create(slide)
    patches = fast.PatchGenerator.create(patch, patch, level=0, maskThreshold=_LEAST_TISSUE).connect(0, importer)
    if tissue_only:
        # By colour: its network for tissue would be downloaded.
        patches.connect(1, fast.TissueSegmentation.create(useColorThresholdingMethod=True).connect(importer))
    network = fast.SegmentationNetwork.create(model, scaleFactor=1.0, threshold=0.0, inferenceEngine="OpenVINO")
    stitcher = fast.PatchStitcher.create(False, True).connect(network.connect(patches))
    finished = fast.RunUntilFinished.create().connect(stitcher)
    fast.TIFFImagePyramidExporter.create(output).connect(finished).run()


if __name__ == "__main__":
    started = time.perf_counter()
    slide_path, model_path, output_path, patch_size, area = sys.argv[1:]
    segment(slide_path, model_path, output_path, int(patch_size), area == "tissue")
    print("\n" + json.dumps({"seconds": time.perf_counter() - started}), flush=True)
