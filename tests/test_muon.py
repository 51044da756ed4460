"""The optimiser of filters, held against torch's own and against the iteration that defines it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.architectures import build_learner, outer_weights
from pipeline.classes import Class, Classes
from pipeline.muon import Muon
from pipeline.network import ModelSpec
from pipeline.settings import TrainingSettings
from pipeline.training import Trainer

CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Gland", (0, 128, 0))))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers whose columns differ in size a hundredfold, so that directions of the matrix do as well."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers * torch.logspace(0, -2, numbers[0].numel()).view(numbers[0].shape)


def moved(gradients: list[torch.Tensor], decay: float = 0.0) -> torch.Tensor:
    """Where a weight of ones is after steps of learning rate 0.1."""
    weight = nn.Parameter(torch.ones_like(gradients[0]))
    optimiser = Muon([weight], 0.1, decay)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimiser.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(16, 144), (24, 24), (5, 7)])
def test_a_matrix_moves_as_with_torchs_own_muon(shape: tuple[int, int]) -> None:
    gradients = [random(*shape, seed=seed) for seed in range(4)]
    weight = nn.Parameter(torch.ones(shape))
    reference = torch.optim.Muon([weight], 0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        weight.grad = gradient.clone()
        reference.step()
    expected = weight.detach() - 1
    assert (moved(gradients, 0.1) - 1 - expected).norm() < 0.02 * expected.norm()  # torch multiplies in bf16


@pytest.mark.parametrize(
    ("shape", "rounding"),
    # Of a square, whose directions differ most in size, the product with itself has a range that fp32 just holds.
    [((8, 16, 3, 3), 1e-5), ((16, 8, 3, 3), 1e-5), ((16, 16, 1, 1), 1e-3), ((24, 8), 1e-5)],
)
def test_filters_move_by_the_iteration_that_defines_muon(shape: tuple[int, ...], rounding: float) -> None:
    gradient = random(*shape)
    rows = 0 if shape[0] <= shape[1] else 1
    matrix = gradient.movedim(rows, 0).flatten(1).double()
    answer = matrix / matrix.norm()
    for _ in range(5):
        gram = answer @ answer.T
        answer = (3.4445 * torch.eye(len(gram)) - 4.7750 * gram + 2.0315 * gram @ gram) @ answer
    expected = -0.1 * 0.2 * max(matrix.shape) ** 0.5 * answer
    found = (moved([gradient]) - 1).movedim(rows, 0).flatten(1).double()
    assert (found - expected).norm() < rounding * expected.norm()


def test_every_direction_of_a_step_is_about_as_large() -> None:
    sizes = torch.linalg.svdvals(random(16, 8, 3, 3).movedim(1, 0).flatten(1))
    steps = torch.linalg.svdvals((moved([random(16, 8, 3, 3)]) - 1).movedim(1, 0).flatten(1))
    assert sizes.max() / sizes.min() > 2 * steps.max() / steps.min()
    assert steps.max() / steps.min() < 2


def test_layout_in_memory_and_weights_without_gradient_change_nothing() -> None:
    gradient = random(8, 16, 3, 3)
    channels_last = gradient.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(moved([channels_last]), moved([gradient]), atol=1e-7)
    still = nn.Parameter(torch.ones(4, 4))
    Muon([still], 0.1).step()
    assert torch.equal(still, torch.ones(4, 4))


def learnt_by_muon(spec: ModelSpec) -> set[str]:
    """The names of the weights that the optimiser of filters has."""
    trainer = Trainer(spec, build_learner(spec), TrainingSettings(), 0)
    names = {id(weight): name for name, weight in trainer.network.named_parameters()}
    found = [
        group["params"]
        for optimiser in trainer.optimisers
        if isinstance(optimiser, Muon)
        for group in optimiser.param_groups
    ]
    return {names[id(weight)] for weights in found for weight in weights}


@pytest.mark.parametrize(
    "values",
    [
        {"architecture": "fcn"},
        {"architecture": "heatmap"},
        {"architecture": "classifier"},
        {"architecture": "basic_unet", "depth": 4},
        *({"architecture": "unet", "residual_units": units} for units in (0, 1, 2)),
        {"architecture": "flexible_unet", "depth": 5, "encoder": "resnet10"},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_colours_and_classes_are_left_to_adamw_however_many_classes_there_are(values: dict[str, object]) -> None:
    """With few classes no other layer is as narrow as the first and the last ones; at width 8, eight have a width of it."""
    spec = ModelSpec(**{"classes": CLASSES, "mpp": 1.0, "patch_size": 32, "width": 8, "depth": 2, **values})
    weights = [(name, weight.shape) for name, weight in build_learner(spec).named_parameters() if weight.ndim > 1]
    wide = {name for name, shape in weights if min(shape[:2]) > 3}
    assert weights[0][0] not in wide and weights[-1][0] not in wide and len(wide) >= len(weights) / 2
    for count in (1, 2, 3, 8, 22):
        classes = Classes(tuple(Class(str(index), (0, 0, 0)) for index in range(count)))
        assert learnt_by_muon(replace(spec, classes=classes)) == wide


def test_no_random_number_is_drawn_to_tell_who_learns_what() -> None:
    spec = ModelSpec(architecture="unet", classes=CLASSES, mpp=1.0, patch_size=32, width=8, depth=2)
    before = torch.get_rng_state()
    outer_weights(spec)
    assert torch.equal(torch.get_rng_state(), before)
