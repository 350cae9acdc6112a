"""Low-rank adapters, drop-in for their `flax.nnx` namesakes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from ..arguments import checked
from ..layers.linear import low_rank
from ..parameters import role_metadata
from .linear import Linear, SplitProduct, unit_normal

zeros = nnx.initializers.zeros_init()


class LoRA(SplitProduct, nnx.LoRA):
    """`flax.nnx.LoRA` of two unit-scaled products: base(x) + (x A) B.

    A is unit-normal, and B zero: so the sum starts as the base, B's gradient at unit
    scale, and what is learnt reaches the base's scale as B reaches 1. Takes the
    arguments of its namesake and those of `Linear`: formats, constraint, the names of
    axes, of which `in_axis_name` concerns A and `out_axis_name` B, and output_scale,
    here of (x A) B alone.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Callable[..., jax.Array] | None = None,
        a_initializer: nnx.Initializer = unit_normal,
        a_metadata: Mapping[str, Any] | None = None,
        b_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **more: Any,
    ):
        super().__init__(
            in_features,
            lora_rank,
            out_features,
            base_module=base_module,
            a_initializer=a_initializer,
            a_metadata=role_metadata("weight", in_features) | dict(a_metadata or {}),
            b_metadata=role_metadata("weight", lora_rank) | dict(b_metadata or {}),
            rngs=rngs,
            **more,
        )

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        arrays = self.promote_dtype(
            (x, self.lora_a[...], self.lora_b[...]), dtype=self.dtype
        )
        y = low_rank(self, *arrays)
        return y if self.base_module is None else y + self.base_module(x, **kwargs)


class LoRALinear(nnx.LoRALinear, Linear):
    """`flax.nnx.LoRALinear`: a `Linear` with a `LoRA` beside it.

    Takes the arguments of its namesake; formats, constraint and batch_axis_name concern
    both.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        a_initializer: nnx.Initializer = unit_normal,
        b_initializer: nnx.Initializer = zeros,
        a_metadata: Mapping[str, Any] | None = None,
        b_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        checked(super().__init__)(
            in_features, out_features, lora_rank=lora_rank, rngs=rngs, **namesake
        )
        plain = self.lora
        self.lora = LoRA(
            in_features,
            lora_rank,
            out_features,
            dtype=plain.dtype,
            param_dtype=plain.param_dtype,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=plain.lora_param_type,
            promote_dtype=plain.promote_dtype,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
            formats=self.formats,
            constraint=self.constraint,
            batch_axis_name=self.batch_axis_name,
            in_axis_name=self.in_axis_name,
            out_axis_name=self.out_axis_name,
            rngs=rngs,
        )
