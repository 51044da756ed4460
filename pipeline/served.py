"""The code that MLflow runs to serve a model. Nothing imports it: MLflow copies it beside the weights and executes it.

That is MLflow's "models from code": what is stored is source, YAML and safetensors, and no pickle. Being executed, the
file sets its model at its end; torch is imported only once the model is loaded.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

GLASS = 255
"""Value of what lies outside a slide: white."""


class Segmenter(PythonModel):  # type: ignore[misc]
    """Class probabilities for patches at the model's own mpp."""

    def load_context(self, context: Any) -> None:
        """Loads the network from the checkpoint folder among the model's files."""
        from pipeline.runtime import EXACT, load_engine, with_flips

        folder = Path(context.artifacts["checkpoint"])
        self.engine = load_engine(folder, with_flips(EXACT, folder, None))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Probabilities of (N, H, W, 3) uint8 RGB patches, as `fullfield segment` computes them for a slide of that size.

        Returns (N, classes, ceil(H / output_stride), ceil(W / output_stride)) float32, 0 to 1. A patch that is no
        multiple of the model's stride is continued with glass at its right and bottom, as a slide is. A patch does not tell
        how its slide is stained: for a model with a stain normalisation the parameter `staining` does, the JSON text of
        `staining` in the slide's provenance.json; without it patches are taken as they are, with a warning. A network that
        is not local, whose windows `fullfield segment` blends, takes the patch for one window.

        Raises MlflowException, which a server answers with 400, where all is black, since MLflow cuts what a request holds
        between 0 and 1 down to 0; and where `staining` is no such text.
        """
        spec = self.engine.spec
        if model_input.max(initial=0) <= 1:
            raise MlflowException.invalid_parameter_value("black patches: RGB from 0 to 255 is expected, not from 0 to 1")
        _, height, width, _ = model_input.shape
        below, right = -height % spec.stride, -width % spec.stride
        patches = np.pad(model_input, ((0, 0), (0, below), (0, right), (0, 0)), constant_values=GLASS)
        rows, columns = -(-height // spec.output_stride), -(-width // spec.output_stride)
        return self.engine(self._normalised(patches, (params or {}).get("staining", "")))[:, :, :rows, :columns]

    def _normalised(self, patches: np.ndarray, staining: str) -> np.ndarray:
        """The patches as the model sees them, where it has a normalisation, of a slide of this staining."""
        from pipeline.staining import Staining
        from pipeline.stains import restained

        normalisation = self.engine.spec.normalisation
        if normalisation is None:
            return patches
        if not staining:
            warnings.warn("no parameter `staining`: patches are not normalised, as slides are", UserWarning, stacklevel=2)
            return patches
        try:
            found = Staining.from_dict(json.loads(staining))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            expected = "the JSON text of `staining` in the slide's provenance.json"
            raise MlflowException.invalid_parameter_value(f"the parameter `staining`: expected {expected}") from error
        return np.stack([restained(patch, found, normalisation) for patch in patches])


set_model(Segmenter())
