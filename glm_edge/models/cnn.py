"""Convolutional classifiers: ResNet, MobileNet of depthwise-separable blocks, MobileNetV2, RepVGG.

A model needs the variables that `init` returns: `params`, and `batch_stats` with the running
statistics of its batch norms. With `deploy`, convolutions have biases and no norms;
`glm_edge.compress.reparameterize` converts the variables of the training form to that form.
Kernels are `[height, width, in / groups, out]`.

Letters of shapes: `B` images, `H` rows, `W` columns, `C` channels, `N` classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from glm_edge.errors import ConfigError
from glm_edge.models.layers import Linear

NORM_EPS = 1e-5
NORM_MOMENTUM = 0.9
Outputs = tuple[Array, dict[str, Any]]

_he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclass(frozen=True)
class Stem:
    """The first convolution.

    Attributes:
      features: output channels.
      kernel: height and width of the kernel.
      stride: stride in both directions.
      pool: adds a 3x3 maximum pooling of stride 2.
    """

    features: int
    kernel: int = 3
    stride: int = 2
    pool: bool = False


@dataclass(frozen=True)
class StageConfig:
    """A stage of `depth` blocks with `features` channels; the first block has the stride."""

    features: int
    depth: int
    stride: int


@dataclass(frozen=True)
class Inverted:
    """An inverted residual: expand to `hidden`, filter each channel, project to `features`.

    Attributes:
      features: output channels.
      hidden: channels of the depthwise convolution.
      stride: stride of the depthwise convolution.
      expand: False if the input already has `hidden` channels.
    """

    features: int
    hidden: int
    stride: int
    expand: bool = True


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network of basic blocks (`expansion` 1) or bottlenecks (`expansion` 4)."""

    name: str
    stem: Stem
    stages: tuple[StageConfig, ...]
    expansion: int = 4
    num_classes: int = 1000
    image_size: tuple[int, int, int] = (224, 224, 3)


@dataclass(frozen=True)
class SeparableConfig:
    """A network of depthwise-separable blocks, `(features, stride)` each."""

    name: str
    stem: Stem
    blocks: tuple[tuple[int, int], ...]
    num_classes: int = 1000
    image_size: tuple[int, int, int] = (224, 224, 3)


@dataclass(frozen=True)
class MobileNetV2Config:
    """A network of inverted residuals, ending in a 1x1 convolution to `head_features`."""

    name: str
    stem: Stem
    blocks: tuple[Inverted, ...]
    head_features: int = 1280
    num_classes: int = 1000
    image_size: tuple[int, int, int] = (224, 224, 3)


@dataclass(frozen=True)
class RepVGGConfig:
    """A plain stack of 3x3 blocks, including the stem."""

    name: str
    stem: Stem
    stages: tuple[StageConfig, ...]
    num_classes: int = 1000
    image_size: tuple[int, int, int] = (224, 224, 3)


CNNConfig = ResNetConfig | SeparableConfig | MobileNetV2Config | RepVGGConfig


class ConvNorm(nn.Module):
    """A convolution and its batch norm; with `deploy`, a convolution with a bias.

    Attributes:
      features: output channels.
      kernel: odd height and width; padding keeps the size at stride 1.
      stride: stride in both directions.
      groups: count of channel groups.
      deploy: uses a bias instead of the norm.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    deploy: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.stride,
            padding=self.kernel // 2,
            feature_group_count=self.groups,
            use_bias=self.deploy,
            kernel_init=_he,
            name="conv",
        )(x)
        return x if self.deploy else batch_norm(train, "norm")(x)


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """Create the batch norm over B, H and W of all models of this file."""
    return nn.BatchNorm(not train, momentum=NORM_MOMENTUM, epsilon=NORM_EPS, name=name)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of three convolutions, with a shortcut."""

    features: int
    stride: int
    expansion: int
    deploy: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def conv(name: str, features: int, kernel: int, stride: int = 1) -> ConvNorm:
            return ConvNorm(features, kernel, stride, deploy=self.deploy, name=name)

        wide = self.features * self.expansion
        if self.expansion == 1:
            y = nn.relu(conv("conv1", self.features, 3, self.stride)(x, train))
            y = conv("conv2", wide, 3)(y, train)
        else:
            y = nn.relu(conv("conv1", self.features, 1)(x, train))
            y = nn.relu(conv("conv2", self.features, 3, self.stride)(y, train))
            y = conv("conv3", wide, 1)(y, train)
        if x.shape != y.shape:
            x = conv("shortcut", wide, 1, self.stride)(x, train)
        return nn.relu(x + y)


class SeparableBlock(nn.Module):
    """A depthwise 3x3 convolution, then a pointwise 1x1 convolution.

    References:
      MobileNets, https://arxiv.org/abs/1704.04861.
    """

    features: int
    stride: int = 1
    deploy: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        channels = x.shape[-1]
        x = ConvNorm(channels, 3, self.stride, channels, self.deploy, name="depthwise")(x, train)
        return nn.relu(
            ConvNorm(self.features, 1, deploy=self.deploy, name="pointwise")(nn.relu(x), train)
        )


class InvertedBlock(nn.Module):
    """An inverted residual with linear bottlenecks.

    References:
      MobileNetV2, https://arxiv.org/abs/1801.04381.
    """

    block: Inverted
    deploy: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        block, y = self.block, x
        if block.expand:
            y = nn.relu6(ConvNorm(block.hidden, 1, deploy=self.deploy, name="expand")(y, train))
        depthwise = ConvNorm(
            block.hidden, 3, block.stride, block.hidden, self.deploy, name="depthwise"
        )
        y = nn.relu6(depthwise(y, train))
        y = ConvNorm(block.features, 1, deploy=self.deploy, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class RepVGGBlock(nn.Module):
    """A 3x3, a 1x1 and (if shapes allow) an identity branch; one 3x3 convolution with `deploy`.

    References:
      RepVGG: Making VGG-style ConvNets Great Again, https://arxiv.org/abs/2101.03697.
    """

    features: int
    stride: int = 1
    deploy: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.deploy:
            return nn.relu(ConvNorm(self.features, 3, self.stride, deploy=True, name="merged")(x))
        y = ConvNorm(self.features, 3, self.stride, name="branch_3x3")(x, train)
        y = y + ConvNorm(self.features, 1, self.stride, name="branch_1x1")(x, train)
        if x.shape == y.shape:
            y = y + batch_norm(train, "branch_identity")(x)
        return nn.relu(y)


class CNN(nn.Module):
    """An image classifier with the architecture of its configuration.

    Attributes:
      config: configuration of one of the architectures of this file.
      deploy: convolutions have biases instead of norms, see the module's docstring.

    References:
      Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385. The blocks
      have their own references.
    """

    config: CNNConfig
    deploy: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Outputs:
        """Compute logits of the classes.

        Args:
          images: [B, H, W, C] preprocessed images.
          train: norms use the statistics of the batch, and update the running statistics if
            `batch_stats` is mutable.

        Returns:
          `(logits, intermediates)`: logits [B, N]; and `hidden` (the output [B, H, W, C] of the
          stem and of every block) and `pooled` [B, C].
        """
        stem = self.config.stem
        if isinstance(self.config, RepVGGConfig):
            x = RepVGGBlock(stem.features, stem.stride, self.deploy, name="stem")(images, train)
        else:
            first = ConvNorm(
                stem.features, stem.kernel, stem.stride, deploy=self.deploy, name="stem"
            )
            relu = nn.relu6 if isinstance(self.config, MobileNetV2Config) else nn.relu
            x = relu(first(images, train))
        if stem.pool:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        hidden = [x]
        for block in _blocks(self.config, self.deploy):
            x = block(x, train)
            hidden.append(x)
        if isinstance(self.config, MobileNetV2Config):
            x = ConvNorm(self.config.head_features, 1, deploy=self.deploy, name="head")(x, train)
            x = nn.relu6(x)
        pooled = jnp.mean(x, axis=(1, 2))
        logits = Linear(self.config.num_classes, use_bias=True, name="classifier")(pooled)
        return logits, {"hidden": hidden, "pooled": pooled}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.config.num_classes

    def classify(self, batch: Mapping[str, Array], train: bool = False) -> Array:
        """Compute logits [B, N] of a batch with `images` [B, H, W, C]."""
        return self(batch["images"], train)[0]


def _blocks(config: CNNConfig, deploy: bool) -> list[nn.Module]:
    """Create the blocks between stem and head, named `blocks_<i>` within the calling module."""
    if isinstance(config, MobileNetV2Config):
        return [
            InvertedBlock(block, deploy, name=f"blocks_{index}")
            for index, block in enumerate(config.blocks)
        ]
    if isinstance(config, SeparableConfig):
        return [
            SeparableBlock(features, stride, deploy, name=f"blocks_{index}")
            for index, (features, stride) in enumerate(config.blocks)
        ]
    strides = [
        (stage.features, stage.stride if index == 0 else 1)
        for stage in config.stages
        for index in range(stage.depth)
    ]
    if isinstance(config, RepVGGConfig):
        return [
            RepVGGBlock(features, stride, deploy, name=f"blocks_{index}")
            for index, (features, stride) in enumerate(strides)
        ]
    return [
        ResidualBlock(features, stride, config.expansion, deploy, name=f"blocks_{index}")
        for index, (features, stride) in enumerate(strides)
    ]


def mobilenet_v2(width: float = 1.0) -> MobileNetV2Config:
    """Configure MobileNetV2 with a width multiplier; channels are multiples of eight.

    Args:
      width: multiplier of all channel counts, at least 0.1.

    Returns:
      The configuration.

    Raises:
      ConfigError: `width` is below 0.1.

    References:
      MobileNetV2, https://arxiv.org/abs/1801.04381.
    """
    if not width >= 0.1:
        raise ConfigError(f"mobilenet_v2: width must be at least 0.1, not {width}")
    table: tuple[tuple[int, int, int, int], ...]
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
    table += ((6, 160, 3, 2), (6, 320, 1, 1))
    stem = channels = _eights(32 * width)
    blocks = []
    for expansion, features, depth, stride in table:
        for index in range(depth):
            block_stride = stride if index == 0 else 1
            hidden, features_now = channels * expansion, _eights(features * width)
            blocks.append(Inverted(features_now, hidden, block_stride, expansion > 1))
            channels = features_now
    head = _eights(1280 * max(1.0, width))
    return MobileNetV2Config(f"mobilenet_v2_{width:g}", Stem(stem), tuple(blocks), head)


def _eights(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _repvgg(name: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> RepVGGConfig:
    stages = tuple(
        StageConfig(width, depth, 2) for width, depth in zip(widths, depths, strict=True)
    )
    return RepVGGConfig(name, Stem(min(64, widths[0])), stages)


_V1_BLOCKS: tuple[tuple[int, int], ...]
_V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2))
_V1_BLOCKS += (*((512, 1),) * 5, (1024, 2), (1024, 1))
_DIGITS: dict[str, Any] = {"num_classes": 10, "image_size": (28, 28, 1)}

PRESETS: Mapping[str, CNNConfig] = MappingProxyType(
    {
        config.name: config
        for config in (
            ResNetConfig(
                "resnet_50",
                Stem(64, 7, 2, pool=True),
                (
                    StageConfig(64, 3, 1),
                    StageConfig(128, 4, 2),
                    StageConfig(256, 6, 2),
                    StageConfig(512, 3, 2),
                ),
            ),
            SeparableConfig("mobilenet_v1", Stem(32), _V1_BLOCKS),
            mobilenet_v2(),
            _repvgg("repvgg_a2", (2, 4, 14, 1), (96, 192, 384, 1408)),
            _repvgg("repvgg_b1", (4, 6, 16, 1), (128, 256, 512, 2048)),
            ResNetConfig(
                "resnet_digits",
                Stem(24, stride=1),
                (StageConfig(24, 2, 1), StageConfig(48, 2, 2), StageConfig(96, 2, 2)),
                expansion=1,
                **_DIGITS,
            ),
            SeparableConfig(
                "separable_digits", Stem(8, stride=1), ((16, 2), (32, 2), (32, 1)), **_DIGITS
            ),
            MobileNetV2Config(
                "mobilenet_v2_digits",
                Stem(16, stride=1),
                (
                    Inverted(16, 64, 2),
                    Inverted(16, 64, 1),
                    Inverted(32, 96, 2),
                    Inverted(32, 128, 1),
                    Inverted(32, 128, 1),
                ),
                head_features=128,
                **_DIGITS,
            ),
            RepVGGConfig(
                "repvgg_digits",
                Stem(16, stride=1),
                (StageConfig(16, 2, 1), StageConfig(32, 2, 2), StageConfig(64, 1, 2)),
                **_DIGITS,
            ),
        )
    }
)


def preset(name: str) -> CNNConfig:
    """Return a published architecture, or a small one for digits of 28x28 or 8x8 pixels.

    Args:
      name: `resnet_50`, `mobilenet_v1`, `mobilenet_v2_1`, `repvgg_a2`, `repvgg_b1`; or
        `resnet_digits`, `separable_digits`, `mobilenet_v2_digits`, `repvgg_digits`. Models accept
        any image size; change `image_size` to `(8, 8, 1)` with `dataclasses.replace`.

    Returns:
      The configuration.

    Raises:
      ConfigError: no preset has this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
