"""Fits a network to patches; yields what each epoch achieved.

An epoch's learning rate follows how much of the training is over: a warm-up, then half a cosine. Where time runs out first
(`max_minutes`), the cosine is shortened to end with it, so that a bounded training ends as well annealed as a full one, if
it has some epochs: the pace is known once the first is over. Where that one takes more than half of the time, it is all
there is, at the full rate.

Muon learns the filters, AdamW all other weights (muon.py). Several processes may train one network, each on its share of
every batch, to the same weights but for rounding (team.py). Where the device multiplies bf16, the forward pass is computed
in it, unless `precision` is exact; weights stay fp32.

Between two epochs a Trainer's `state` is all that it takes to go on in another process, to the same bits on a CPU with as
many threads; but for `max_minutes`, which has the clock decide how many epochs there are.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, update_bn

from pipeline.architectures import SEEDING, outer_weights
from pipeline.errors import TrainingError
from pipeline.layout import quicken
from pipeline.loss import Loss
from pipeline.memory import memory_sufficing
from pipeline.muon import Muon
from pipeline.network import ModelSpec, normalise
from pipeline.settings import TrainingSettings
from pipeline.team import Alone, Team

_CALIBRATION_BATCHES = 12

Batches = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]
"""epoch -> batches of images (N, S, S, 3) uint8 RGB and masks (N, S, S) uint8, IGNORED where nothing is known.

Of several processes each gets its share: of the patches of every batch the `rank`th, and every `size`th after it."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch achieved: the mean loss, the last learning rate, and the seconds it took.

    `waiting` is the share of the seconds, 0 to 1, in which the network waited for patches.
    """

    number: int
    loss: float
    learning_rate: float
    seconds: float
    waiting: float


class Trainer:
    """A network, its optimisers and its running average, which is the network that is validated and kept.

    The processes of a team each have one, and call the same methods in the same order.
    """

    @memory_sufficing("a network")
    def __init__(
        self, spec: ModelSpec, network: torch.nn.Module, settings: TrainingSettings, seed: int, team: Team | None = None
    ) -> None:
        with SEEDING:
            torch.manual_seed(seed)
        self.spec, self.settings, self.team = spec, settings, team or Alone()
        self.device = self.team.device
        self.network = self.team.prepared(network).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(self.network, multi_avg_fn=_average(settings.weight_average), use_buffers=True)
        if self.device.type == "cpu":
            quicken(self.network)
        self.optimisers = _optimisers(self.network, settings, spec)
        groups = ((optimiser, group) for optimiser in self.optimisers for group in optimiser.param_groups)
        self._optimiser_of = {id(weight): optimiser for optimiser, group in groups for weight in group["params"]}
        self._learner = self.team.learner(self.network)
        self.loss = Loss([settings.class_weights.get(name, 1.0) for name in spec.classes.names], settings.boundary_weight)
        self.recent = deque[np.ndarray](maxlen=_CALIBRATION_BATCHES)
        self._done, self._started = 0, time.monotonic()

    @property
    def seconds(self) -> float:
        """What the training has taken, in an earlier process too; the caller's time between two epochs counts as well."""
        return time.monotonic() - self._started

    @property
    def way(self) -> dict[str, str]:
        """The device, such as the name of a GPU, and the number format of the forward pass: others round otherwise."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"device": device, "format": "bf16" if self._in_bf16 else "fp32"}

    @property
    def planned(self) -> int:
        """How many epochs there will be, at the pace of those that are done."""
        if self.settings.max_minutes is None or not self._done:
            return self.settings.epochs
        return min(self.settings.epochs, max(self._done, int(self.settings.max_minutes * 60 / self.seconds * self._done)))

    def fit(self, batches: Batches) -> Iterator[Epoch]:
        """Train epoch by epoch; between two, the caller validates and saves `averaged()`, and after that the `state()`.

        The caller's time counts against `max_minutes` as well. Raises TrainingError where the loss is not finite, and where
        memory is too small for a step.
        """
        while self._done < (planned := self.team.first(self.planned)):
            with memory_sufficing("a step"):
                epoch = self._epoch(self._done, planned, batches(self._done))
            self._done += 1
            yield epoch

    @memory_sufficing("the state between two epochs")
    def state(self) -> dict[str, torch.Tensor]:
        """All tensors on which the next epochs depend, by dotted name; to be taken between two epochs.

        Of the latest batches, which `averaged` looks at, it holds those that the next epoch does not push out.
        """
        older = deque(self.recent, maxlen=max(_CALIBRATION_BATCHES - self._steps, 0))
        parts: dict[str, Mapping[str, torch.Tensor]] = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "recent": {str(index): self.team.whole(torch.from_numpy(batch)) for index, batch in enumerate(older)},
            "random": {"cpu": torch.get_rng_state()},
        }
        if self.device.type == "cuda":
            parts["random"] = {**parts["random"], "cuda": torch.cuda.get_rng_state()}
        for index, weight in enumerate(self.network.parameters()):
            parts[f"optimiser.{index}"] = self._moments(weight)
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    @memory_sufficing("the state between two epochs")
    def restore(self, state: Mapping[str, torch.Tensor], done: int, seconds: float) -> None:
        """Go on from the `state` after `done` epochs, which took so many seconds.

        Raises KeyError or RuntimeError where it is not the state of such a network.
        """
        self.network.load_state_dict(_part(state, "network"))
        self.average.load_state_dict(_part(state, "average"))
        # Laid out in memory as the optimiser would have done it: other strides take other loops, which may round otherwise.
        for index, weight in enumerate(self.network.parameters()):
            for name, value in _part(state, f"optimiser.{index}").items():
                laid_out = torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value.to(self.device)
                self._moments(weight)[name] = laid_out
        recent = _part(state, "recent")
        shares = (recent[str(index)].numpy()[self.team.rank :: self.team.size] for index in range(len(recent)))
        self.recent.extend(np.ascontiguousarray(share) for share in shares)
        with SEEDING:
            torch.set_rng_state(state["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"])
        self._done, self._started = done, time.monotonic() - seconds

    def averaged(self) -> torch.nn.Module:
        """The network with averaged weights, which is the one to keep.

        Its batch norms get the statistics of these very weights over the latest batches (Izmailov et al. 2018, Averaging
        Weights Leads to Wider Optima): running ones are those of other weights, and of the last few batches alone.
        """
        module: torch.nn.Module = self.average.module
        images = (normalise(torch.from_numpy(batch).to(self.device), self.spec) for batch in self.recent)
        update_bn(images, module)
        return self.team.finished(module).eval()

    @property
    def _steps(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self.settings.patches_per_epoch / self.settings.batch_size)

    def _epoch(self, number: int, planned: int, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Epoch:
        self.network.train()
        started, losses, rate, patches = time.monotonic(), list[float](), 0.0, _Awaited(batches)
        for images, masks in patches:
            rate = self._set_rate(number + len(losses) / self._steps, planned)
            losses.append(self._step(images, masks))
            self.recent.append(images)
        if not math.isfinite(sum(losses)):
            found = f"a loss of {sum(losses)} in epoch {number + 1}"
            raise TrainingError("training", found, "a finite loss", "Lower training.learning_rate.")
        seconds = time.monotonic() - started
        return Epoch(number + 1, float(np.mean(losses)), rate, seconds, patches.seconds / seconds)

    def _set_rate(self, progress: float, planned: int) -> float:
        warm, settings = self.settings.warmup_epochs, self.settings
        if progress < warm:
            share = (progress + 0.02) / (warm + 0.02)
        else:
            share = 0.5 * (1 + math.cos(math.pi * min((progress - warm) / max(planned - warm, 1e-9), 1)))
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = settings.learning_rate * share
        return settings.learning_rate * share

    def _step(self, images: np.ndarray, masks: np.ndarray) -> float:
        inputs = normalise(torch.from_numpy(images).to(self.device), self.spec)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._in_bf16):
            logits = self._learner(inputs).contiguous().float()  # in channels_last few channels are slow to go through
        if logits.ndim == 2:  # a classifier's, whose answer is one pixel for the whole patch
            logits = logits[:, :, None, None]
        truth = _at_output(masks, masks.shape[1] // logits.shape[2])
        classes = torch.from_numpy(truth).to(self.device, torch.long)
        weights = torch.from_numpy(self.loss.weights(truth)).to(self.device)
        loss = self.loss(self.team.whole(logits), self.team.whole(classes), self.team.whole(weights))
        self.network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.average.update_parameters(self.network)
        return loss.item()

    def _moments(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the optimiser that learns a weight keeps of it."""
        moments: dict[str, torch.Tensor] = self._optimiser_of[id(weight)].state[weight]
        return moments

    @property
    def _in_bf16(self) -> bool:
        """Whether that is wanted and the device multiplies it; else it is fp32."""
        return self.settings.precision == "fast" and _multiplies_bf16(self.device)


class _Awaited:
    """The same batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        started = time.monotonic()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.monotonic() - started


def _optimisers(network: torch.nn.Module, settings: TrainingSettings, spec: ModelSpec) -> list[torch.optim.Optimizer]:
    """What learns the filters, and what learns all other weights: each weight has one of them.

    Filters and matrices of the layers that see colours, and of those that give classes, learn better with AdamW.
    """
    filters, others = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
    outer = outer_weights(spec)
    for name, weight in network.named_parameters():
        suits = settings.optimiser == "muon" and weight.ndim > 1 and name not in outer
        (filters if suits else others).append(weight)
    rate, decay = settings.learning_rate, settings.weight_decay
    adamw = torch.optim.AdamW(others, rate, weight_decay=decay, fused=True)
    return [adamw, Muon(filters, rate, decay)] if filters else [adamw]


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; to imitate them takes longer than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _part(state: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors below a dotted name, without it."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def _at_output(masks: np.ndarray, scale: int) -> np.ndarray:
    """Masks at the scale of an answer, `scale` pixels to each of its own: the pixel nearest to each centre."""
    centre = scale // 2
    return np.ascontiguousarray(masks[:, centre::scale, centre::scale])


def _average(decay: float) -> Callable[..., None]:
    """The average that forgets by `decay` a step, and faster at first, so that it does not remember the start."""

    @torch.no_grad()
    def update(averages: list[torch.Tensor], values: list[torch.Tensor], count: torch.Tensor) -> None:
        keep = min(decay, (1 + int(count)) / (10 + int(count)))
        for average, value in zip(averages, values, strict=True):
            if torch.is_floating_point(average):
                average.lerp_(value, 1 - keep)
            else:
                average.copy_(value)

    return update
