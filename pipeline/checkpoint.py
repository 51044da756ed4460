"""A trained model on disk: a folder with what it is, what it has learnt and how the two give an answer.

    model.yaml            the spec, the run that made it and the version that wrote it; the SHA-256 of spec, weights and
                          graph, so that a model whose halo was edited, or whose weights were damaged on the way, is refused
    weights.safetensors   the weights
    network.json          the network as a graph, see graph.py; absent where it has none, and `build_network` builds it

No pickle is ever loaded. Importing this module, and reading a spec or a digest, imports neither torch nor MONAI; loading a
network that has its graph does not import MONAI either.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline import __version__
from pipeline.errors import CheckpointError, NetworkError
from pipeline.files import file_digest, file_stamp, name_file
from pipeline.network import ModelSpec
from pipeline.weights import TOGETHER, check_fit, load_weights
from pipeline.yaml_text import called

if TYPE_CHECKING:
    import torch

    from pipeline.graph import Graph

_SPEC = "model.yaml"
_WEIGHTS = "weights.safetensors"
_GRAPH = "network.json"
_FILES = (_SPEC, _WEIGHTS, _GRAPH)
_ANCESTRY = "ancestry.json"
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
_FOLD = "fold-1/model"
_RUN_RECORD = "lineage"  # its key in model.yaml
_SEAL, _DIGESTS = "spec_sha256", {_GRAPH: "network", _WEIGHTS: "weights_sha256"}  # keys of digests there
_REQUIRED, _OPTIONAL = ("fullfield", "spec"), (_SEAL, *_DIGESTS.values(), _RUN_RECORD)  # keys of model.yaml
_AS_WRITTEN = "Use the file as Fullfield wrote it, or train the model again."


def save(
    folder: Path,
    spec: ModelSpec,
    network: torch.nn.Module,
    run_record: Mapping[str, object] | None = None,
    ancestry: Mapping[str, object] | None = None,
    keep_earlier: bool = False,
) -> None:
    """Write a model, whole or not at all, over an earlier one in the same folder; or else, with `keep_earlier`, leave that
    beside it until `put_back` or `let_go`.

    `run_record` is what the run that trained the model hands on, as plain values: the digest of its inputs, seed, epoch,
    Dice, and how it looks at slides (tissue, min_region_um2, flips). It is the key `lineage` of model.yaml, and part of the
    digest. `ancestry` is who made the model, when, and of what, and no part of it. Raises CheckpointError where the folder
    holds other things.
    """
    check_place(folder)
    fresh, stale = _beside(folder)
    recover(folder)
    let_go(folder)
    fresh.mkdir(parents=True)
    try:
        _write(fresh, spec, network, {} if run_record is None else {_RUN_RECORD: dict(run_record)})
        if ancestry is not None:
            (fresh / _ANCESTRY).write_text(json.dumps(ancestry, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        name_file(error, folder)
        raise
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    if not keep_earlier:
        let_go(folder)


def check_place(folder: Path) -> None:
    """Raise CheckpointError where a model cannot be saved to a folder, since other things are there."""
    if folder.is_file() or (folder.is_dir() and not {item.name for item in folder.iterdir()} <= {*_FILES, _ANCESTRY}):
        expected = "a new folder, or one that holds a model and nothing else"
        raise CheckpointError(str(folder), "other files", expected, "Move them away, or save to another folder.")


def recover(folder: Path) -> None:
    """Put an earlier model back, if a save over it was cut short between its two renames."""
    _, stale = _beside(folder)
    if stale.exists() and not folder.exists():
        stale.rename(folder)


def put_back(folder: Path) -> None:
    """Put the earlier model, if it still waits, in the place of the one that was saved over it; whole or not at all."""
    fresh, stale = _beside(folder)
    if stale.exists():
        folder.rename(fresh)
        recover(folder)
        shutil.rmtree(fresh)


def let_go(folder: Path) -> None:
    """Remove what waits beside a model: an earlier one, or what a killed process left of another."""
    for left_over in _beside(folder):
        shutil.rmtree(left_over, ignore_errors=True)


def load(folder: Path) -> tuple[ModelSpec, torch.nn.Module]:
    """The spec and the network, with its weights, on the CPU and ready for evaluation. Raises CheckpointError.

    The network is a GraphNetwork where the model has its graph, else what `build_network` builds.
    """
    from pipeline.graph import described

    spec, graph = load_spec(folder), _load_graph(folder)
    weights = load_weights(folder / _WEIGHTS)
    if graph is not None:
        _check_weights(folder, described(weights), graph.weights)
        return spec, _assembled(folder / _GRAPH, spec, graph, weights)
    from pipeline.architectures import build_network

    network = build_network(spec)
    _check_weights(folder, described(weights), described(network.state_dict()))
    network.load_state_dict(weights)
    return spec, network.eval()


def load_spec(folder: Path) -> ModelSpec:
    """What the model in a folder is, without loading its weights. Raises CheckpointError."""
    content = _read(folder)
    try:
        spec = ModelSpec.from_dict(content["spec"])
    except NetworkError as error:
        subject = f"{folder / _SPEC}, written by Fullfield {content['fullfield']}: {error.subject}"
        raise CheckpointError(subject, error.found, error.expected, error.remedy) from error
    sealed = _sealed(content["spec"])
    if content.get(_SEAL, sealed) != sealed:
        found = f"a spec of SHA-256 {sealed}: it was changed"
        raise CheckpointError(str(folder / _SPEC), found, f"the one of {_SEAL}, {content[_SEAL]}", _AS_WRITTEN)
    return spec


def load_run_record(folder: Path) -> dict[str, Any]:
    """The `run_record` that `save` was given, perhaps empty. Raises CheckpointError."""
    return dict(deepcopy(_read(folder).get(_RUN_RECORD, {})))


def load_ancestry(folder: Path) -> dict[str, Any]:
    """Who made the model in a folder, when and of what, as `save` was told; perhaps nothing. Raises CheckpointError."""
    check_files(folder)
    try:
        found: dict[str, Any] = json.loads((folder / _ANCESTRY).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no keys and values")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(str(folder / _ANCESTRY), f"broken JSON ({error})", "a model's ancestry", TOGETHER) from error
    return found


def digest(folder: Path) -> str:
    """A SHA-256 over all its files but its ancestry, as hexadecimal digits.

    Raises CheckpointError where there is no model, or its weights or its graph are not those that it was written with.
    """
    _check_written(folder, _GRAPH, _WEIGHTS)
    total = hashlib.sha256()
    for path in (folder / name for name in _FILES if (folder / name).is_file()):
        total.update(bytes.fromhex(file_digest(path)))
    return total.hexdigest()


def check_files(folder: Path) -> None:
    """Raise CheckpointError where there is no folder with the files of a model."""
    expected = f"a folder with {_SPEC} and {_WEIGHTS}"
    if folder.suffix.lower() in _PICKLES and folder.is_file():
        remedy = "A pickle can run any code when opened, so none is loaded; give the folder that `fullfield train` wrote."
        raise CheckpointError(str(folder), "a pickle", expected, remedy)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        own = folder.is_file() and folder.name in (*_FILES, _ANCESTRY)
        fold = folder.parent / _FOLD  # where a cross-validation's output was given, which has no model of its own
        other = fold if fold.is_dir() else "the folder of the model, such as OUTPUT/model"
        raise CheckpointError(str(folder), found, expected, f"Give {folder.absolute().parent if own else other}.")
    missing = [name for name in (_SPEC, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickles = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in _PICKLES)
        beside = f", but the pickle {pickles[0]}, which is never loaded" if pickles else ""
        found = f"no {' and no '.join(missing)}{beside}"
        inner = next((folder / name for name in ("model", "ensemble", _FOLD) if (folder / name).is_dir()), None)
        remedy = "Give the folder of the model, OUTPUT/model, whole." if inner is None else f"Give {inner}."
        raise CheckpointError(str(folder), found, expected, remedy)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a model is written before it takes its name, and where the earlier one waits meanwhile."""
    return folder.with_name(f"{folder.name}.new.partial"), folder.with_name(f"{folder.name}.old.partial")


def _write(folder: Path, spec: ModelSpec, network: torch.nn.Module, more: Mapping[str, object]) -> None:
    """The files of a model; `more` are further keys of `model.yaml`."""
    from safetensors.torch import save

    from pipeline.tracing import trace

    weights = save({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()})
    (folder / _WEIGHTS).write_bytes(weights)  # safetensors' save_file leaves a file that nobody else may read
    digests = {_SEAL: _sealed(spec.to_dict()), _DIGESTS[_WEIGHTS]: hashlib.sha256(weights).hexdigest()}
    content: dict[str, object] = {"fullfield": __version__, "spec": spec.to_dict(), **digests}
    try:
        graph = trace(network, spec).to_json()
    except NetworkError:  # what has no graph can still be built by whoever loads it
        pass
    else:
        (folder / _GRAPH).write_text(graph, encoding="utf-8")
        content[_DIGESTS[_GRAPH]] = hashlib.sha256(graph.encode()).hexdigest()
    text = yaml.safe_dump({**content, **more}, sort_keys=False, allow_unicode=True)
    (folder / _SPEC).write_text(text, encoding="utf-8")


def _sealed(spec: object) -> str:
    """A SHA-256 over a spec as it is written, in plain values: other versions may write other keys."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def _load_graph(folder: Path) -> Graph | None:
    """The graph that `model.yaml` names; None: it names none. Raises CheckpointError where the file is not that one."""
    from pipeline.graph import Graph

    _check_written(folder, _GRAPH)
    path = folder / _GRAPH
    return Graph.from_json(path.read_bytes().decode("utf-8", "replace"), str(path)) if path.is_file() else None


def _check_weights(folder: Path, described: Mapping[str, str], needed: Mapping[str, str]) -> None:
    """Raise CheckpointError where the weights are not such as the network needs, or not those that `model.yaml` names."""
    check_fit(folder / _WEIGHTS, described, needed)
    _check_written(folder, _WEIGHTS)


def _check_written(folder: Path, *names: str) -> None:
    """Raise CheckpointError where the weights or the graph are not the files that `model.yaml` names by their digests."""
    content = _read(folder)
    for name in names:
        expected, path = content.get(_DIGESTS[name]), folder / name
        found = file_digest(path) if path.is_file() else None
        if found != expected and not (name == _WEIGHTS and expected is None):
            told, wanted = (f"SHA-256 {found}" if found else "no such file"), f"the file of SHA-256 {expected}"
            raise CheckpointError(str(path), told, f"{wanted if expected else 'no such file'}, by {_SPEC}", TOGETHER)


def _assembled(path: Path, spec: ModelSpec, graph: Graph, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The network of a graph, if it answers a small image in the size that the spec promises."""
    import torch

    from pipeline.graph import GraphNetwork
    from pipeline.tracing import example_step

    step = example_step(spec)
    expected = (1, len(spec.classes), 2 * step // spec.output_stride, 3 * step // spec.output_stride)
    try:
        network = GraphNetwork(graph, weights).eval()
        with torch.inference_mode():
            found = tuple(network(torch.zeros(1, 3, 2 * step, 3 * step)).shape)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(str(path), f"a graph that does not run ({error})", f"one for {_WEIGHTS}", TOGETHER) from error
    if found != expected:
        wanted = f"{expected}, by {_SPEC}"
        raise CheckpointError(str(path), f"an answer of {found} to {2 * step} x {3 * step} pixels", wanted, TOGETHER)
    return network


def _read(folder: Path) -> Mapping[str, Any]:
    """The content of `model.yaml`, to be left as it is, which a process parses but once while it is unchanged."""
    check_files(folder)
    return _stamped_content(folder / _SPEC, *file_stamp(folder / _SPEC))


@lru_cache(maxsize=64)
def _stamped_content(path: Path, *stamp: int) -> Mapping[str, Any]:
    """What a `model.yaml` says: all keys that are required, and of the others some."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(str(path), f"broken YAML ({error})", "a model's description", _AS_WRITTEN) from error
    if not isinstance(content, dict) or not set(_REQUIRED) <= set(content) <= {*_REQUIRED, *_OPTIONAL}:
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else called(content)
        expected = f"the keys {' and '.join(_REQUIRED)}, perhaps {', '.join(_OPTIONAL)}"
        raise CheckpointError(str(path), found, expected, _AS_WRITTEN)
    if not isinstance(content.get(_RUN_RECORD, {}), dict):
        raise CheckpointError(str(path), f"the lineage {content[_RUN_RECORD]!r}", "keys and values", _AS_WRITTEN)
    return content
