"""What becomes of a GPU's memory once it is no longer wanted."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pipeline.errors import TrainingError
from pipeline.memory import gpu_given_back, memory_sufficing


class Network:
    """Anything that holds memory; in a circle, as networks are."""

    def __init__(self) -> None:
        self.itself = self


def training(networks: weakref.WeakSet[Network], full: bool) -> Iterator[int]:
    network = Network()
    networks.add(network)
    yield 1
    with memory_sufficing("a step"):
        _step(network, full)


def _step(network: Network, full: bool) -> None:
    if full:
        raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("full", [False, True])
def test_what_a_training_held_is_given_back_though_its_error_is_kept(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives back to a GPU what no tensor is in any more; of a GPU that is not here, who is asked to."""
    networks, alive = weakref.WeakSet[Network](), list[int]()

    gpu = SimpleNamespace(empty_cache=lambda: alive.append(len(networks)))
    monkeypatch.setattr("pipeline.memory.cuda", lambda: gpu)
    error = None
    try:
        with gpu_given_back():
            for _ in training(networks, full):
                assert len(networks) == 1
    except TrainingError as found:
        error = found
    assert (error is not None) == full and alive == [0]
