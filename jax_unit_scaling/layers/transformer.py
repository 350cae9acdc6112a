"""The maths of a Transformer block: branches, the places of norms, and weights."""

from collections.abc import Callable

import jax

from ..arguments import checked
from ..ops.residual import residual_apply, transformer_residual_rule

Norm = Callable[[jax.Array], jax.Array]
Branch = Callable[[jax.Array], jax.Array]
ResidualRule = Callable[[int, int], float]


def pre_norm(norm: Norm, branch: Branch, x: jax.Array, *, tau: float) -> jax.Array:
    """A residual branch that starts with its norm: skip x + w branch(norm(x))."""
    return residual_apply(lambda x: branch(norm(x)), x, tau=tau)


def post_norm(norm: Norm, branch: Branch, x: jax.Array, *, tau: float) -> jax.Array:
    """A norm behind the residual add: norm(skip x + w branch(x)).

    Reference: Attention Is All You Need (Vaswani et al., 2017), section 3.1.
    """
    return norm(residual_apply(branch, x, tau=tau))


def branch_norm(norm: Norm, branch: Branch, x: jax.Array, *, tau: float) -> jax.Array:
    """A residual branch that ends with its norm: skip x + w norm(branch(x)).

    Every branch then has unit scale, also where values that are correlated along the
    sequence make attention's output large.

    Reference: mu-nit Scaling (Narayan et al., 2025), "Res-Post-LayerNorm".
    """
    return residual_apply(lambda x: norm(branch(x)), x, tau=tau)


def block_taus(
    rule: ResidualRule | None, index: int, depth: int
) -> tuple[float, float]:
    """The ratios of a block's attention and MLP branch, of 2 depth residual adds."""
    rule = rule or transformer_residual_rule()
    return rule(2 * index, 2 * depth), rule(2 * index + 1, 2 * depth)


@checked
def feed_forward(
    up: Branch,
    gate: Branch | None,
    down: Branch,
    x: jax.Array,
    *,
    activation: Callable[..., jax.Array],
) -> jax.Array:
    """`down(activation(up(x), gate(x)))`, or without a gate."""
    inputs = (up(x),) if gate is None else (up(x), gate(x))
    return down(activation(*inputs))
