"""The weights of a model on disk, and whether they are those that its network has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TOGETHER = "Keep the files of a model together, as they were written."
"""What to do where a file of a model is not the one that belongs to the others."""

_SHOWN = 4  # weights that an error names


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name. Raises CheckpointError where it is no whole one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        expected = "a whole safetensors file"
        raise CheckpointError(str(path), f"a broken file ({error})", expected, "Copy the model again.") from error
    return weights


def check_fit(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise CheckpointError where a file holds other weights than a network needs, both as `graph.described` has them."""
    wrong = [f"no {name}" for name in expected if name not in found]
    wrong += [f"unknown {name}" for name in found if name not in expected]
    common = [name for name in expected if name in found]
    wrong += [f"{name} of {found[name]} for {expected[name]}" for name in common if found[name] != expected[name]]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(str(path), "; ".join(wrong[:_SHOWN]) + more, "the weights that the network has", TOGETHER)
