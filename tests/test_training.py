import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pipeline import training
from pipeline.architectures import build_network
from pipeline.classes import IGNORED, Class, Classes
from pipeline.errors import TrainingError
from pipeline.network import ModelSpec, normalise
from pipeline.settings import TrainingSettings
from pipeline.snapshot import Standing, load, save
from pipeline.training import Trainer

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Dark", (0, 0, 0))))
SPEC = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=32, width=4, depth=2)


def trainer(seed: int = 0, **values: object) -> Trainer:
    torch.manual_seed(seed)
    settings = TrainingSettings(epochs=3, patches_per_epoch=16, batch_size=4, learning_rate=2e-2, weight_average=0.5)
    return Trainer(SPEC, build_network(SPEC), settings.model_copy(update=values), seed)


def batches(epoch: int, count: int = 4):
    """Dark squares on a light ground, and where they are; a stripe of which nothing is known."""
    rng = np.random.default_rng(epoch)
    for _ in range(count):
        images = rng.integers(180, 255, (4, 32, 48, 3), dtype=np.uint8)
        masks = np.zeros((4, 32, 48), np.uint8)
        for image, mask in zip(images, masks, strict=True):
            y, x = rng.integers(0, 16), rng.integers(0, 30)
            image[y : y + 14, x : x + 16] //= 3
            mask[y : y + 14, x : x + 16] = 1
        masks[:, :, 44:] = IGNORED
        yield images, masks


def test_it_learns() -> None:
    epochs = list(trainer(epochs=12).fit(batches))
    assert epochs[-1].loss < 0.35 * epochs[0].loss
    assert [epoch.number for epoch in epochs] == list(range(1, 13))


def test_what_is_learned_is_right() -> None:
    model = trainer(epochs=12)
    list(model.fit(batches))
    images, masks = next(batches(99))
    with torch.inference_mode():
        labels = model.averaged()(normalise(images, SPEC)).argmax(1).numpy()
    assert (labels == masks)[masks != IGNORED].mean() > 0.97


def test_one_seed_gives_one_result() -> None:
    first, second, third = trainer(), trainer(), trainer(seed=1)
    losses = [[epoch.loss for epoch in model.fit(batches)] for model in (first, second, third)]
    assert losses[0] == losses[1] != losses[2]
    for a, b in zip(first.averaged().parameters(), second.averaged().parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_learns_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any processor can imitate bf16; the weights stay fp32, so that small steps are not rounded away."""
    monkeypatch.setattr(training, "_multiplies_bf16", lambda device: True)
    exact, fast = trainer(epochs=12, precision="exact"), trainer(epochs=12)
    expected, found = ([epoch.loss for epoch in model.fit(batches)] for model in (exact, fast))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.2, abs=0.05)
    assert {weight.dtype for weight in fast.averaged().parameters()} == {torch.float32}
    assert [model.way["format"] for model in (exact, fast)] == ["fp32", "bf16"]


def test_a_heavier_class_is_found_where_the_patch_leaves_it_open() -> None:
    def share(**values: object) -> float:
        def doubtful(epoch: int):
            rng = np.random.default_rng(epoch)
            for _ in range(4):
                yield np.full((4, 32, 48, 3), 120, np.uint8), (rng.random((4, 32, 48)) < 0.4).astype(np.uint8)

        model = trainer(epochs=3, **values)
        list(model.fit(doubtful))
        with torch.inference_mode():
            answer = model.averaged()(normalise(np.full((1, 32, 48, 3), 120, np.uint8), SPEC)).softmax(1)
        return float(answer[0, 1].mean())

    assert share() < 0.5 < share(class_weights={"Dark": 3.0})


def test_the_rate_warms_up_and_anneals() -> None:
    model = trainer(epochs=10, warmup_epochs=2.0)
    rates = [model._set_rate(progress, 10) for progress in np.arange(0, 10, 0.25)]
    assert rates[0] < 0.1 * max(rates)
    assert rates.index(max(rates)) == 8
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[-1] < 0.01 * max(rates)


def test_time_ends_the_training_with_an_annealed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(training, "time", clock)

    def slow(epoch: int):
        for batch in batches(epoch, 4):
            clock.now += 2.5
            yield batch

    epochs = list(trainer(epochs=100_000, max_minutes=1.0).fit(slow))
    assert len(epochs) == 6
    assert epochs[-1].learning_rate < 0.1 * max(epoch.learning_rate for epoch in epochs)
    (only,) = trainer(epochs=100_000, max_minutes=0.3, warmup_epochs=0.5).fit(slow)  # 10 s of 18
    assert only.learning_rate == pytest.approx(2e-2)  # nothing told in time that it would be the last


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = trainer()
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="learning_rate"):
        list(model.fit(batches))


def test_the_average_forgets_the_start() -> None:
    model = trainer(epochs=6, weight_average=0.9)
    start = [value.clone() for value in model.network.parameters()]
    list(model.fit(batches))
    pairs = zip(start, model.network.parameters(), model.averaged().parameters(), strict=True)
    far, near = np.array([((a - c).norm().item(), (b - c).norm().item()) for a, b, c in pairs]).sum(axis=0)
    assert 0 < near < far


@pytest.mark.parametrize(("step", "kept"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10_000, 0.99)])
def test_the_average_forgets_faster_at_first(step: int, kept: float) -> None:
    average = torch.ones(3)
    training._average(0.99)([average], [torch.zeros(3)], torch.tensor(step))
    assert average.tolist() == pytest.approx([kept] * 3)


def test_what_is_kept_has_the_batch_statistics_of_its_own_weights_over_the_latest_batches() -> None:
    model = trainer(patches_per_epoch=56)
    next(model.fit(lambda epoch: batches(epoch, 14)))
    kept = model.averaged()
    norms = {name: layer for name, layer in kept.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    expected = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in norms.items()}
    seen = {name: list[tuple[torch.Tensor, torch.Tensor]]() for name in norms}
    for name, layer in norms.items():
        layer.register_forward_pre_hook(lambda _, inputs, own=seen[name]: own.append(statistics(*inputs)))
    with torch.no_grad():
        for images, _ in list(batches(0, 14))[-12:]:
            kept.train()(normalise(images, SPEC))
    assert len(norms) > 2
    for name, parts in seen.items():
        for found, truth in zip(expected[name], zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(truth).mean(dim=0))


def statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel of a batch."""
    return pixels.mean(dim=(0, 2, 3)), pixels.var(dim=(0, 2, 3))


def test_a_huge_loss_takes_no_huge_step() -> None:
    model = trainer(patches_per_epoch=4)
    with torch.no_grad():
        model.network.head.conv.weight.mul_(1e4)
    epoch = next(model.fit(lambda number: batches(number, 1)))
    assert epoch.loss > 1000
    gradients = [weight.grad.norm() for weight in model.network.parameters()]
    assert torch.stack(gradients).norm().item() == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize(("count", "optimiser"), [(4, "muon"), (13, "muon"), (4, "adamw")])
def test_a_state_leads_to_the_same_bits(tmp_path: Path, count: int, optimiser: str) -> None:
    """Older batches matter to an epoch of 4, and to one of 13 no more."""

    def states(model: Trainer) -> list[dict[str, torch.Tensor]]:
        found = []
        for _ in model.fit(lambda epoch: batches(epoch, count)):
            model.averaged()
            save(tmp_path / "state", Standing({}, (), model.seconds), model.state())
            found.append(load(tmp_path / "state")[1])
        return found

    values = {"epochs": 4, "patches_per_epoch": 4 * count, "optimiser": optimiser}
    undisturbed = states(trainer(**values))
    assert any("momentum" in name for name in undisturbed[0]) == (optimiser == "muon")
    assert any(name.startswith("recent.") for name in undisturbed[0]) == (count == 4)
    for done, state in enumerate(undisturbed[:3], 1):
        model = trainer(seed=7, **values)  # whose own weights and random numbers are others
        model.restore(state, done, 0.0)
        resumed = states(model)
        assert len(resumed) == 4 - done
        assert resumed[-1].keys() == undisturbed[-1].keys()
        for name, tensor in undisturbed[-1].items():
            assert torch.equal(resumed[-1][name], tensor), name


def test_time_before_an_interruption_counts(tmp_path: Path) -> None:
    first = trainer(epochs=100, max_minutes=60.0)
    next(first.fit(batches))
    again = trainer(epochs=100, max_minutes=60.0)
    again.restore(first.state(), done=1, seconds=3599.0)
    assert list(again.fit(batches)) == []


def test_another_networks_state_is_refused() -> None:
    state = trainer().state()
    with pytest.raises(RuntimeError, match="size mismatch"):
        wider = SPEC.__class__(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=32, width=8, depth=2)
        Trainer(wider, build_network(wider), TrainingSettings(), 0).restore(state, 1, 0.0)


def test_waiting_for_patches_is_told() -> None:
    def slow(epoch: int):
        for batch in batches(epoch):
            time.sleep(0.05)
            yield batch

    ready = list(batches(0))
    (quick,) = trainer(epochs=1).fit(lambda epoch: iter(ready))
    (late,) = trainer(epochs=1).fit(slow)
    assert late.waiting * late.seconds >= 4 * 0.05
    assert 0 <= quick.waiting < late.waiting <= 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, max allowed: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_a_step_that_does_not_fit_into_memory_is_an_error_that_says_what_to_lower(error: Exception) -> None:
    def too_large(epoch: int):
        raise error
        yield

    with pytest.raises(TrainingError, match=r"no memory for a step .*Lower training\.batch_size"):
        list(trainer().fit(too_large))


def test_a_network_that_does_not_fit_into_memory_is_such_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is put on the device, taken down or gone on with: that it is not for a state to be broken."""
    model, full = trainer(epochs=1), Mock(side_effect=torch.AcceleratorError("CUDA error: out of memory"))
    list(model.fit(batches))
    state = model.state()
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", full)
    monkeypatch.setattr(torch.nn.Module, "state_dict", full)
    monkeypatch.setattr(torch.nn.Module, "to", full)
    for demand in (trainer, model.state, lambda: model.restore(state, 1, 0.0)):
        with pytest.raises(TrainingError, match=r"no memory for .*Lower training\.batch_size"):
            demand()


def test_other_errors_of_a_step_are_not_taken_for_lack_of_memory() -> None:
    def wrong(epoch: int):
        raise RuntimeError("shapes differ")
        yield

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(trainer().fit(wrong))
