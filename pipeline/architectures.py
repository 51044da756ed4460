"""Builds the networks that specs describe.

Nothing in these networks is tied to an image's size: convolutions, norms, pooling, strides, upsampling by two.
So what was trained on patches runs on an image of any size that is a multiple of its stride.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.blocks.upsample import UpSample
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.flexible_unet import FlexibleUNet
from monai.networks.nets.unet import UNet
from torch import nn

from pipeline.classes import Class, Classes
from pipeline.dense import Classifier, convolutional
from pipeline.network import FAMILIES, ModelSpec

SEEDING = threading.Lock()
"""To be held where torch's random numbers are set, or weights drawn from them: all threads of a process share them."""

_COLOURS = 3  # channels of an image, fewer than any other layer sees: the least width is 4


def build_network(spec: ModelSpec) -> nn.Module:
    """The network of a spec, as it segments slides, with weights drawn from torch's global random numbers.

    It takes (N, 3, H, W) float32 as `normalise` gives them, H and W multiples of the stride, and returns logits,
    (N, classes, H / output_stride, W / output_stride) float32; `activation` turns them into probabilities.
    """
    return for_slides(build_learner(spec))


def seeded_learner(spec: ModelSpec, seed: int) -> nn.Module:
    """What `build_learner` builds, with the weights of a seed, also where other threads train: see `SEEDING`."""
    with SEEDING:
        torch.manual_seed(seed)
        return build_learner(spec)


def build_learner(spec: ModelSpec) -> nn.Module:
    """The same network in the form that learns from patches: differs for a `classifier`, which answers once a patch.

    That takes (N, 3, patch_size, patch_size) float32 and returns logits (N, classes) float32.
    """
    unets = {"unet": _unet, "basic_unet": _basic_unet, "flexible_unet": _flexible_unet}
    builders = {"fcn": _fcn, "heatmap": _heatmap, "classifier": _classifier, **unets}
    return builders[spec.architecture](spec)


def for_slides(learner: nn.Module) -> nn.Module:
    """The form that segments slides of a network that has learnt: a classifier made convolutional, any other as it is."""
    return convolutional(learner) if isinstance(learner, Classifier) else learner


def outer_weights(spec: ModelSpec) -> frozenset[str]:
    """The names of those of a learner's weights that see colours or give classes: of its first layers and its last ones.

    Other layers may have as many channels as there are classes. So they are told by what would change with the classes: a
    network of another number of them is laid out beside this one, both without memory, and no random numbers are drawn.
    """
    count = 1 if len(spec.classes) > 1 else 2
    other = replace(spec, classes=Classes(tuple(Class(str(index), (0, 0, 0)) for index in range(count))), rest=None)
    with torch.device("meta"):
        here, there = (
            {name: tuple(weight.shape) for name, weight in build_learner(each).named_parameters()} for each in (spec, other)
        )
    return frozenset(name for name, shape in here.items() if shape != there[name] or shape[1:2] == (_COLOURS,))


def _fcn(spec: ModelSpec) -> nn.Module:
    head = Convolution(2, spec.width, len(spec.classes), kernel_size=1, conv_only=True)
    return nn.Sequential(OrderedDict(body=_fcn_level(spec, 0), head=head))


def _fcn_level(spec: ModelSpec, level: int) -> nn.Module:
    """The levels from `level` on: encode, add what comes back from deeper down, decode."""
    if level == spec.depth:
        return _encode(spec, level)
    channels = _channels(spec, level)
    mode = "deconv" if _upsample(spec) == "transpose" else "nontrainable"
    up = UpSample(2, 2 * channels, channels, 2, mode=mode, interp_mode="nearest", align_corners=None)
    deeper = nn.Sequential(OrderedDict(level=_fcn_level(spec, level + 1), up=up))
    # Adding costs half the memory of concatenating, in the layers that have the most pixels.
    skip = SkipConnection(deeper, mode="add")
    return nn.Sequential(OrderedDict(encode=_encode(spec, level), skip=skip, decode=_convolution(channels, channels)))


def _heatmap(spec: ModelSpec) -> nn.Module:
    levels = [_encode(spec, level) for level in range(spec.depth + 1)]
    channels = _channels(spec, spec.depth)
    dense = _convolution(channels, channels, kernel=1)
    head = Convolution(2, channels, len(spec.classes), kernel_size=1, conv_only=True)
    return nn.Sequential(OrderedDict(encode=nn.Sequential(*levels), dense=dense, head=head))


def _classifier(spec: ModelSpec) -> Classifier:
    layers, before, size = list[nn.Module](), _COLOURS, spec.patch_size
    for level in range(spec.depth):
        channels = _channels(spec, level)
        layers += [_unpadded(before, channels), _unpadded(channels, channels), nn.MaxPool2d(2)]
        before, size = channels, (size - 4) // 2
    hidden = _channels(spec, spec.depth)
    dense = [nn.Linear(before * size**2, hidden), nn.ReLU(), nn.Linear(hidden, len(spec.classes))]
    margin = (spec.patch_size - 2**spec.depth) // 2
    return Classifier(nn.Sequential(*layers), nn.Sequential(*dense), margin, spec.glass[0])


def _unpadded(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def _encode(spec: ModelSpec, level: int) -> nn.Module:
    """Two convolutions, of which the first halves the image below level 0; one at the bottom, where halos are dear."""
    channels = _channels(spec, level)
    before = _channels(spec, level - 1) if level else _COLOURS
    pool = (spec.downsample or FAMILIES[spec.architecture].downsample[0]) == "pool"
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if level and pool else []
    layers.append(_convolution(before, channels, stride=1 if pool or not level else 2))
    if level < spec.depth:
        layers.append(_convolution(channels, channels))
    return nn.Sequential(*layers)


def _convolution(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    layer: nn.Module = Convolution(2, before, after, stride, kernel, norm="BATCH", act="RELU", bias=False)
    return layer


def _unet(spec: ModelSpec) -> nn.Module:
    channels = [_channels(spec, level) for level in range(spec.depth + 1)]
    relu = ("RELU", {"inplace": True})
    # MONAI's own PReLU would take a fifth of the training step on a CPU, most of it for its gradient.
    units = FAMILIES["unet"].residual_units[0] if spec.residual_units is None else spec.residual_units
    network: nn.Module = UNet(
        2, _COLOURS, len(spec.classes), channels, [2] * spec.depth, num_res_units=units, norm=_norm(spec), act=relu
    )
    return network


def _basic_unet(spec: ModelSpec) -> nn.Module:
    features = [spec.width * factor for factor in (1, 1, 2, 4, 8, 1)]
    network: nn.Module = BasicUNet(2, _COLOURS, len(spec.classes), features, norm=_norm(spec), upsample="deconv")
    return network


def _flexible_unet(spec: ModelSpec) -> nn.Module:
    network: nn.Module = FlexibleUNet(
        in_channels=_COLOURS,
        out_channels=len(spec.classes),
        backbone=str(spec.encoder),
        decoder_channels=tuple(spec.width * factor for factor in (16, 8, 4, 2, 1)),
        norm="batch",
        upsample="deconv" if _upsample(spec) == "transpose" else "nontrainable",
        interp_mode="nearest",
        is_pad=False,
    )
    return network


def _norm(spec: ModelSpec) -> str | tuple[str, dict[str, bool]]:
    """MONAI's name of a unet's norm; either kind learns a scale and a shift for each channel."""
    return ("instance", {"affine": True}) if spec.norm == "instance" else "batch"


def _channels(spec: ModelSpec, level: int) -> int:
    return int(spec.width * 2**level)


def _upsample(spec: ModelSpec) -> str:
    return spec.upsample or FAMILIES[spec.architecture].upsample[0]
