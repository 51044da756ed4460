"""A trained model on disk: a folder with `model.yaml`, what it is, and `weights.safetensors`, what it has learnt.

No pickle is ever loaded. Importing this module, and reading a spec or a digest, imports neither torch nor MONAI.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline import __version__
from pipeline.errors import CheckpointError, NetworkError
from pipeline.network import ModelSpec, build_network

if TYPE_CHECKING:
    import torch

_SPEC = "model.yaml"
_WEIGHTS = "weights.safetensors"
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
_REQUIRED = {"fullfield", "spec"}
_SHOWN = 4  # weights that an error names


def save(folder: Path, spec: ModelSpec, network: torch.nn.Module, lineage: Mapping[str, object] | None = None) -> None:
    """Write a model, whole or not at all, over an earlier one in the same folder.

    `lineage` says where the model comes from, as plain values. Raises CheckpointError where the folder holds other things.
    """
    from safetensors.torch import save_file

    if folder.is_file() or (folder.is_dir() and not {item.name for item in folder.iterdir()} <= {_SPEC, _WEIGHTS}):
        expected = "a new folder, or one that holds a model and nothing else"
        raise CheckpointError(str(folder), "other files", expected, "Save to another folder.")
    content: dict[str, object] = {"fullfield": __version__, "spec": spec.to_dict()}
    if lineage is not None:
        content["lineage"] = dict(lineage)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    fresh, stale = (folder.with_name(f"{folder.name}.{name}.partial") for name in ("new", "old"))
    if stale.exists() and not folder.exists():  # an earlier save was cut short between its two renames
        stale.rename(folder)
    for left_over in (fresh, stale):
        shutil.rmtree(left_over, ignore_errors=True)
    fresh.mkdir(parents=True)
    (fresh / _SPEC).write_text(text, encoding="utf-8")
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, fresh / _WEIGHTS)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def load(folder: Path) -> tuple[ModelSpec, torch.nn.Module]:
    """The spec and the network, with its weights, on the CPU and ready for evaluation. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    spec = load_spec(folder)
    path = folder / _WEIGHTS
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        expected = "a whole safetensors file"
        raise CheckpointError(str(path), f"a broken file ({error})", expected, "Copy the model again.") from error
    network = build_network(spec)
    _check_fit(path, weights, network.state_dict())
    network.load_state_dict(weights)
    return spec, network.eval()


def load_spec(folder: Path) -> ModelSpec:
    """What the model in a folder is, without loading its weights. Raises CheckpointError."""
    content = _read(folder)
    try:
        return ModelSpec.from_dict(content["spec"])
    except NetworkError as error:
        subject = f"{folder / _SPEC}, written by Fullfield {content['fullfield']}: {error.subject}"
        raise CheckpointError(subject, error.found, error.expected, error.remedy) from error


def load_lineage(folder: Path) -> dict[str, Any]:
    """Where the model in a folder comes from, as `save` was told; perhaps nothing. Raises CheckpointError."""
    return dict(_read(folder).get("lineage", {}))


def digest(folder: Path) -> str:
    """A SHA-256 over both files, as hexadecimal digits. Raises CheckpointError where there is no model."""
    _check_files(folder)
    total = hashlib.sha256()
    for name in (_SPEC, _WEIGHTS):
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    """The content of `model.yaml`: the keys fullfield and spec, and perhaps lineage."""
    _check_files(folder)
    path = folder / _SPEC
    remedy = "Use the file as Fullfield wrote it, or train the model again."
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), f"broken YAML ({error})", "a model's description", remedy) from error
    if not isinstance(content, dict) or not _REQUIRED <= set(content) <= {*_REQUIRED, "lineage"}:
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(str(path), found, "the keys fullfield and spec, and perhaps lineage", remedy)
    if not isinstance(content.get("lineage", {}), dict):
        raise CheckpointError(str(path), f"the lineage {content['lineage']!r}", "keys and values", remedy)
    return content


def _check_files(folder: Path) -> None:
    expected = f"a folder with {_SPEC} and {_WEIGHTS}"
    if folder.suffix.lower() in _PICKLES and folder.is_file():
        remedy = "A pickle can run any code when opened, so none is loaded; give the folder that `fullfield train` wrote."
        raise CheckpointError(str(folder), "a pickle", expected, remedy)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise CheckpointError(str(folder), found, expected, "Give the folder that `fullfield train` wrote.")
    missing = [name for name in (_SPEC, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickles = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in _PICKLES)
        beside = f", but the pickle {pickles[0]}, which is never loaded" if pickles else ""
        found = f"no {' and no '.join(missing)}{beside}"
        raise CheckpointError(str(folder), found, expected, "Give the folder that `fullfield train` wrote, whole.")


def _check_fit(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    wrong = [f"no {name}" for name in expected if name not in found]
    wrong += [f"unknown {name}" for name in found if name not in expected]
    for name in (name for name in expected if name in found):
        if (found[name].shape, found[name].dtype) != (expected[name].shape, expected[name].dtype):
            wrong.append(f"{name} of {_describe(found[name])} for {_describe(expected[name])}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        remedy = "Keep both files of a model together, as they were written."
        raise CheckpointError(str(path), "; ".join(wrong[:_SHOWN]) + more, f"the weights that {_SPEC} describes", remedy)


def _describe(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'one'} {str(tensor.dtype).removeprefix('torch.')}"
