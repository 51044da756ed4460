"""A patch classifier, and the fully convolutional network that it becomes.

A dense layer over a map of n x n features is a convolution of that size, seen at one place. So a classifier of patches of
P pixels that halves them d times is, with its dense layers made convolutions, a network for images of any size, which
answers once for every s = 2**d pixels. What neighbouring patches have in common, almost all, is computed once.

    |ggggg|cccc|cccc|cccc|ggggg|      c: one cell of s pixels, g: glass beside the image, (P - s) / 2 pixels of it
    `-----patch-----´                 the answer for a cell is that for the patch centred on it
         `-----patch-----´
"""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy

import torch
from torch import nn


class Classifier(nn.Module):
    """Unpadded convolutions and pooling, then dense layers: one answer for a patch.

    `features` turns (N, 3, P, P) into (N, C, n, n), `dense` (N, C * n * n) into logits (N, classes). `margin` is (P - s) / 2
    pixels, and `glass` the value of white, normalised: what surrounds an image once the classifier is convolutional.
    """

    def __init__(self, features: nn.Sequential, dense: nn.Sequential, margin: int, glass: float) -> None:
        super().__init__()
        self.features, self.dense, self.margin, self.glass = features, dense, margin, glass

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of patches (N, 3, P, P) float32."""
        logits: torch.Tensor = self.dense(self.features(patches).flatten(1))
        return logits


def convolutional(classifier: Classifier) -> nn.Module:
    """The network that gives, for each cell of s x s pixels, what the classifier gives for the patch centred on it.

    It takes (N, 3, H, W), H and W multiples of s, and returns logits (N, classes, H / s, W / s). Glass is laid around the
    image, as it is around a slide. The weights are copies.
    """
    features = deepcopy(classifier.features)
    channels = [layer.out_channels for layer in features.modules() if isinstance(layer, nn.Conv2d)][-1]
    layers: list[nn.Module] = []
    for layer in classifier.dense:
        # The first dense layer sees all places of the map, the others the one that is left.
        layers.append(_as_convolution(layer, channels) if isinstance(layer, nn.Linear) else deepcopy(layer))
        channels = layer.out_features if isinstance(layer, nn.Linear) else channels
    surroundings = nn.ConstantPad2d(classifier.margin, classifier.glass)
    network = nn.Sequential(OrderedDict(surroundings=surroundings, features=features, dense=nn.Sequential(*layers)))
    return network.train(classifier.training)


def _as_convolution(layer: nn.Linear, channels: int) -> nn.Conv2d:
    """The dense layer over a square map of so many channels, as a convolution of the map's size."""
    size, weight = round((layer.in_features / channels) ** 0.5), layer.weight.detach()
    # Without random weights to begin with: they would be thrown away, and the next random numbers be others.
    convolution: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, channels, layer.out_features, size)  # type: ignore[no-untyped-call]
    weight = weight.reshape(layer.out_features, channels, size, size)
    convolution.load_state_dict({"weight": weight, "bias": layer.bias.detach()})
    return convolution.to(weight)
