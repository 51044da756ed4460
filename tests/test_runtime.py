"""Which engine a model gets, and that either gives the same answer."""

import itertools
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")

from pipeline import checkpoint, openvino_graph, runtime
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.errors import EngineError
from pipeline.files import write_json
from pipeline.footprint import with_footprint
from pipeline.network import ModelSpec
from pipeline.openvino_engine import OpenVinoEngine, beside_int8
from pipeline.openvino_graph import GRAPH, quantise
from pipeline.phantom import render
from pipeline.runtime import (
    describe,
    engines_folder,
    fp32_graph,
    holds_turned,
    int8_folder,
    is_calibrated,
    keep_engine,
    load_engine,
    settled,
    with_flips,
)
from pipeline.settings import EngineSettings

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))
WINDOWS = render(5, 160, 96, 1.0, spread=3)[0][None]
TORCH, OPENVINO = EngineSettings(backend="torch"), EngineSettings(backend="openvino")
FASTEST = EngineSettings(precision="fastest", backend="openvino")


def save(folder: Path, seed: int) -> Path:
    """A small model with random weights."""
    torch.manual_seed(seed)
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=32, width=4, depth=2)
    network = build_network(spec).eval()
    checkpoint.save(folder, with_footprint(spec, network), network)
    return folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save(tmp_path / "model", 1)


def test_both_backends_agree_and_load_once(model: Path) -> None:
    answers = [load_engine(model, settings)(WINDOWS) for settings in (TORCH, OPENVINO)]
    assert np.abs(answers[0] - answers[1]).max() < 1e-6
    assert load_engine(model, OPENVINO) is load_engine(model, OPENVINO)
    assert load_engine(model, OPENVINO) is load_engine(model, OPENVINO.model_copy(update={"max_label_change": 0.1}))
    assert {path.name for path in model.iterdir()} <= {"model.yaml", "weights.safetensors", "network.json"}


def test_a_model_trained_anew_is_loaded_anew(model: Path) -> None:
    for settings in (TORCH, OPENVINO):
        before = load_engine(model, settings)(WINDOWS)
        save(model, 2 if settings is TORCH else 3)
        assert np.abs(load_engine(model, settings)(WINDOWS) - before).max() > 1e-3


def test_a_second_process_finds_the_graph_and_needs_no_torch(model: Path) -> None:
    answer = load_engine(model, OPENVINO)(WINDOWS)
    np.save(model.parent / "windows.npy", WINDOWS)
    code = (
        "import sys, numpy as np; from pathlib import Path; from pipeline.config import EngineSettings;"
        "from pipeline.runtime import load_engine; here = Path(sys.argv[1]);"
        "engine = load_engine(here / 'model', EngineSettings(backend='openvino'));"
        "np.save(here / 'answer.npy', engine(np.load(here / 'windows.npy')));"
        "sys.exit(bool({'torch', 'monai', 'mlflow', 'nncf'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(model.parent)], check=True)
    assert (np.load(model.parent / "answer.npy") == answer).all()


def test_int8_is_the_models_own(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no int8 form of this model"):
        load_engine(model, FASTEST)
    with pytest.raises(EngineError, match="no int8 form of this model"):
        describe(model, FASTEST)
    quantise(fp32_graph(model), [WINDOWS[0]], int8_folder(model))
    assert isinstance(load_engine(model, FASTEST), OpenVinoEngine)
    assert describe(model, FASTEST).startswith(f"fastest {beside_int8()}, openvino {version('openvino')}, ")
    stored = Path(shutil.copytree(model, model.parent / "checkpoint"))  # as in the registry
    write_json(engines_folder(model) / "approval.json", {})
    for _ in range(2):
        keep_engine(model, "approval.json")
        (weights,) = (tmp_path / "cache").glob("fullfield/engines/*/int8/network.bin")
        assert weights.read_bytes() == (int8_folder(model) / "network.bin").read_bytes()
        weights.unlink()  # as a disk that is cleared may lose it
    keep_engine(model, "approval.json")
    assert (load_engine(stored, FASTEST)(WINDOWS) == load_engine(model, FASTEST)(WINDOWS)).all()
    assert describe(stored, FASTEST) == describe(model, FASTEST)
    assert is_calibrated(model) and not is_calibrated(stored)
    save(model, 2)
    with pytest.raises(EngineError, match="no int8 form of this model"):
        load_engine(model, FASTEST)


def test_an_int8_graph_made_anew_or_copied_in_is_loaded_anew(model: Path) -> None:
    """Which is what labels are then said to depend on."""
    other, told = save(model.parent / "other", 2), set[str]()
    for source in (model, other):
        shutil.rmtree(int8_folder(model), ignore_errors=True)
        graph = Path(shutil.copytree(fp32_graph(source).parent, int8_folder(model))) / GRAPH  # calibrating takes seconds
        fresh = OpenVinoEngine(checkpoint.load_spec(model), graph, "fastest")
        assert (load_engine(model, FASTEST)(WINDOWS) == fresh(WINDOWS)).all()
        assert load_engine(model, FASTEST) is load_engine(model, FASTEST)
        told.add(describe(model, FASTEST))
    assert len(told) == 2


def test_auto_becomes_one_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settled(EngineSettings())
    assert chosen.backend in ("torch", "openvino") and settled(chosen) == chosen
    assert settled(TORCH) == TORCH
    monkeypatch.setattr(openvino_graph, "installed", lambda: False)
    assert settled(EngineSettings()).backend == "torch"
    assert settled(EngineSettings(precision="fastest")).backend == "openvino"


def test_auto_takes_openvino_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    for precision in ("exact", "fast", "fastest"):
        assert settled(EngineSettings(precision=precision)).backend == "openvino"


def test_auto_takes_torch_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    assert settled(EngineSettings()).backend == "torch"
    assert settled(EngineSettings(precision="fast")).backend == "torch"


@pytest.mark.parametrize("settings", [TORCH, OPENVINO])
def test_flips_are_the_mean_over_mirror_images_and_turns_and_part_of_what_labels_depend_on(
    model: Path, settings: EngineSettings
) -> None:
    flips = settings.model_copy(update={"flips": True})
    plain, mirrored = load_engine(model, settings), load_engine(model, flips)
    down, across = WINDOWS[:, ::-1].copy(), WINDOWS.swapaxes(1, 2).copy()
    answers = []
    for rows, columns in itertools.product((1, -1), repeat=2):
        answers.append(plain(WINDOWS[:, ::rows, ::columns].copy())[:, :, ::rows, ::columns])
        answers.append(plain(across[:, ::rows, ::columns].copy())[:, :, ::rows, ::columns].swapaxes(2, 3))
    assert np.abs(mirrored(WINDOWS) - np.mean(answers, axis=0)).max() < 1e-6
    assert np.abs(mirrored(WINDOWS) - answers[0]).max() > 1e-4
    assert np.abs(mirrored(down)[:, :, ::-1] - mirrored(WINDOWS)).max() < 1e-6
    assert np.abs(mirrored(across).swapaxes(2, 3) - mirrored(WINDOWS)).max() < 1e-6
    assert describe(model, flips) == f"{describe(model, settings)}, eight views"
    assert not holds_turned(settings)
    assert holds_turned(flips) == (len(getattr(mirrored._engine, "_requests", ())) == 2)


def test_flips_are_those_of_the_models_own_run_unless_told(tmp_path: Path) -> None:
    spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=32, width=4, depth=2)
    network = build_network(spec).eval()
    for flips in (False, True):
        folder = tmp_path / str(flips)
        checkpoint.save(folder, with_footprint(spec, network), network, {"flips": flips})
        assert with_flips(TORCH, folder, None).flips == flips
        assert with_flips(TORCH, folder, not flips).flips != flips


def test_half_is_named_by_the_device_that_torch_finds(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU is in the machine, but not in this build of torch or not for this process."""
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    fast = EngineSettings(precision="fast", backend="torch")
    assert describe(model, fast) == f"fast bf16, torch {version('torch')}"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert describe(model, fast) == f"fast fp16, torch {version('torch')}"
