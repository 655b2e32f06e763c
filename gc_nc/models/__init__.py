"""Linen networks that return (logits, embedding) from one call."""

from gc_nc.errors import require_extra

require_extra("train", "flax")


import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gc_nc.errors import InputError, suggestion
from gc_nc.models.mlp import MLP, MLP_STAGES
from gc_nc.models.resnet import RESNET_STAGES, ResNet
from gc_nc.models.vgg import VGG, VGG_STAGES

MODEL_NAMES = ("vgg11", "vgg13", "resnet18", "resnet50", "mlp")

__all__ = [
    "MLP",
    "MODEL_NAMES",
    "VGG",
    "ResNet",
    "build_model",
    "embed_fn",
    "layer_names",
]


def build_model(
    name: str,
    num_classes: int,
    *,
    width: float = 1.0,
    batch_norm: bool | None = None,
    dtype: DTypeLike = jnp.float32,
) -> nn.Module:
    """A network that maps (images (B, H, W, c), train=False) to (logits, embedding).

    Args:
      name: one of MODEL_NAMES.
      num_classes: C, the size of the head.
      width: multiplies the channels of every layer.
      batch_norm: None for the architecture's default, which is BatchNorm in ResNet and none in VGG
        and MLP.
      dtype: the dtype of the computation; parameters are float32.

    Raises:
      InputError: an unknown name, `num_classes` below 1, or a width that is not positive.
    """
    if name not in MODEL_NAMES:
        hint = suggestion(name, MODEL_NAMES)
        raise InputError(f"model {name!r} is not one of {', '.join(MODEL_NAMES)}{hint}")
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes} must be at least 1")
    if not (math.isfinite(width) and width > 0):
        raise InputError(f"width={width} must be a positive number, such as 0.25")
    if name == "mlp":
        return MLP(MLP_STAGES, num_classes, width, bool(batch_norm), dtype)
    family, depth = name.rstrip("0123456789"), int(name.lstrip("vgresnt"))
    if family == "vgg":
        return VGG(VGG_STAGES[depth], num_classes, width, bool(batch_norm), dtype)
    stages, bottleneck = RESNET_STAGES[depth]
    return ResNet(stages, bottleneck, num_classes, width, batch_norm is not False, dtype)


@dataclasses.dataclass(frozen=True)
class _Embedder:
    """Maps (variables, images) to the embedding; equal for equal models."""

    model: nn.Module
    layer: str

    def __call__(self, variables, images):
        if self.layer == "embedding":
            return self.model.apply(variables, images, train=False)[1]
        _, state = self.model.apply(variables, images, train=False, mutable=["intermediates"])
        return state["intermediates"][f"{self.layer}_output"][0].reshape(images.shape[0], -1)


def layer_names(model: nn.Module) -> tuple[str, ...]:
    """The layers of `embed_fn` from the input on: the ends of the stages, then the embedding."""
    stem = ("stem",) if isinstance(model, ResNet) else ()
    return (*stem, *(f"stage{i + 1}" for i in range(len(model.stages))), "embedding")


def embed_fn(model: nn.Module, variables, layer: str = "embedding") -> jax.tree_util.Partial:
    """The embedding of a trained network as the `embed_fn` of `gc_nc.metrics`.

    BatchNorm uses its running statistics, so examples do not mix. The variables are leaves of the
    Partial: as an argument of a `jax.jit` of yours it is compiled once for all of them.

    Args:
      model: a network from `build_model`.
      variables: its parameters and running statistics.
      layer: one of `layer_names(model)`, whose flattened output is the embedding.

    Raises:
      InputError: a layer that the model does not have.
    """
    names = layer_names(model)
    if layer not in names:
        raise InputError(f"layer {layer!r} is not one of {', '.join(names)}")
    return jax.tree_util.Partial(_Embedder(model, layer), variables)
