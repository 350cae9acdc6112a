"""u-muP's learning rates for optax.

A weight w ~ N(0, 1) acts in its product as a w, a the forward factor. What should not
depend on width is the change a dw x of the product's output, of one rate's size. With
dw = rate c u and an update u of unit scale that is aligned with x over the fan-in, that
asks for a c fan_in = 1:

    hidden      a = fan_in^-1/2     c = fan_in^-1/2
    readout     a = 1 / fan_in      c = 1
    bias, norm  a = 1, no sum       c = 1
    embedding   a = 1, no sum       c = features^-1/2   (1 in muP; u-muP found this).

The embedding's is a finding, of long trainings. Where a large vocabulary has few steps
to be learned, muP's is better: `overrides={"*embedding": {"fan_in": 1}}` took a
language model of width 1024 with 32768 tokens from 4.12 to 3.39 nats in 300 steps.

Each is multiplied by depth^-1/2 inside a stack of `depth` residual adds: its branches
weigh about depth^-1/2 each, but their updates are aligned and add up to depth^1/2.

- Adam and Lion make updates of unit scale from any gradient: the factors are c.
- SGD's update is the gradient. In a unit-scaled model it has unit scale too: c again.
  In a model whose readout is constrained it has not: see `sgd`.
- Muon's update is an orthogonal matrix: see `muon`.
- Shampoo's, (G G^T)^-1/4 G (G^T G)^-1/4 for one gradient, is the same matrix, so its
  rule is `muon_rule`; grafted onto Adam's size, or as SOAP, which is Adam in a turned
  basis, it is `adam_rule`. optax has none of them, so none is ready-made here: put
  `scale_by_umup(rule=...)` behind one of your own.

Role, fan-in and depth are metadata of the parameters, read when an optimiser's `init`
sees them. The factors then belong to the *structure* of its state: constants to `jit`,
nothing to donate, and nothing in a checkpoint; a run that is restored takes them from
the model that it builds.

The gradients of a loss of this library are those of the sum over examples, so they are
summed over devices and accumulation steps, never averaged. One machine or many, the
update is then the same:

- `jit` with shardings (data parallel, FSDP, tensor parallel): nothing is needed.
- `shard_map`, `pmap`, a `vmap` over examples: `batch_axis_name="data"` for the modules
  (or operations) and the loss, and

      grads = jax.grad(loss)(params, piece_of_the_batch)
      grads = optim.sum_gradients(grads, "data")

- Tensor parallel inside `shard_map`: `model_axis_name="model"` for the modules `MLP`,
  `MoE` (the hidden features of every expert), attention and `TransformerBlock`;
  `vocabulary_axis_name` for `Embed` and `class_axis_name` for `cross_entropy`; for
  other layers see `linear`. Two things are not split there. Convolutions: their work
  is in positions, and the batch or `jit` with shardings splits it. Experts over
  devices: how many tokens go to each is known at run time alone, and static shapes
  then ask for a capacity and dropped tokens, which `mixture_of_experts` has not.
- Accumulation: `multi_steps(optimiser, every)`, or a sum of your own and `optax.scale(
  every**-0.5)`.

References: u-muP (Blake et al., 2024), table 2 and section 3; Tensor Programs V (Yang
et al., 2022), for SGD and Adam; Old Optimizer, New Norm (Bernstein & Newhouse, 2024),
section 2.2, for Shampoo.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import lax
from jax.typing import ArrayLike

from .arguments import checked, positive_integer
from .constraints import Constraint, apply_constraint
from .op import AxisName, check_bound, sums_cotangents
from .parameters import (
    Overrides as Overrides,
    ParameterInfo as ParameterInfo,
    named_parameters,
)

Rule = Callable[[ParameterInfo], float]
LearningRate = float | jax.Array | Callable[[Any], Any]


def adam_rule(info: ParameterInfo) -> float:
    """The factor where updates have unit scale: Adam's, Lion's, and unit-scaled SGD's.

    fan_in^-1/2 for a weight (of an embedding: features^-1/2) and 1 for all others, each
    times depth^-1/2.
    """
    width = info.fan_in if info.role == "weight" and info.fan_in else 1
    return 1 / math.sqrt(width * info.depth)


def sgd_rule(readout: ParameterInfo, constraint: Constraint | None) -> Rule:
    """The rule of `sgd`, for a model with this readout under this constraint.

    Raises:
        ValueError: if the readout's fan-in or fan-out is not known.
    """
    if not (readout.fan_in and readout.fan_out):
        raise ValueError(
            f"`readout` must have `fan_in` and `fan_out`, got {readout}: give them in "
            "`overrides`."
        )
    ideal = readout.fan_out**-0.5
    lost = ideal / apply_constraint(constraint, 1 / readout.fan_in, ideal)[1]
    return lambda info: adam_rule(info) * (1 if info.role == "output" else lost)


def muon_rule(info: ParameterInfo) -> float:
    """The factor of `muon`: fan_out^1/2 depth^-1/2 for a hidden weight, Adam's else."""
    if info.fan_out and _is_matrix(info):
        return math.sqrt(info.fan_out / info.depth)
    return adam_rule(info)


def learning_rate_factors(
    params: Any, *, rule: Rule = adam_rule, overrides: Overrides | None = None
) -> dict[str, float]:
    """The factor on each parameter's learning rate, by path.

    Args:
        params: a tree of parameters in their boxes: an `nnx.state(model, nnx.Param)`.
        rule: gives a parameter's factor from its `ParameterInfo`.
        overrides: path patterns, and what they set of `ParameterInfo`:
            `{"blocks/*/gate": {"role": "bias", "depth": 8}}`.

    Raises:
        ValueError: if a parameter has no role, or a pattern matches no path.
    """
    named = named_parameters(params, overrides)
    return {path: rule(info) for path, (_, info) in named.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """What `report` says of one parameter."""

    path: str
    role: str
    shape: tuple[int, ...]
    fan_in: int | None
    depth: int
    factor: float
    learning_rate: float


class Report(list[Row]):
    """The rows of `report`; printed, a table."""

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(Row)]
        cells = [names] + [[_cell(getattr(row, n)) for n in names] for row in self]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells
        )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@checked
def report(
    params: Any,
    learning_rate: LearningRate,
    *,
    step: int = 0,
    rule: Rule = adam_rule,
    overrides: Overrides | None = None,
) -> Report:
    """The learning rate that each parameter gets; print it to see a table.

    Takes the arguments of `learning_rate_factors`, and the base `learning_rate`: a
    number, or a schedule, of which it is the value at `step`.
    """
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    rows = Report()
    for path, (leaf, info) in named_parameters(params, overrides).items():
        factor = rule(info)
        (value,) = jax.tree.leaves(leaf)
        rows.append(
            Row(
                path,
                info.role,
                value.shape,
                info.fan_in,
                info.depth,
                factor,
                float(rate) * factor,
            )
        )
    return rows


def scale_by_umup(
    *, rule: Rule = adam_rule, overrides: Overrides | None = None
) -> optax.GradientTransformation:
    """Multiplies each update by its parameter's learning-rate factor.

    For any optimiser: it goes behind what makes the updates, in place of Adam say
    `optax.chain(optax.scale_by_adam(), scale_by_umup(),
    optax.scale_by_learning_rate(1.0))`, with the rule that fits their scale.
    """
    return _informed(lambda infos: _scaled_by(rule, infos), overrides)


# The arguments of optax in its order, and behind them ours. They are written out, as
# `optax.inject_hyperparams` binds a call to the signature.


@checked
def adam(
    learning_rate: LearningRate,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    overrides: Overrides | None = None,
) -> optax.GradientTransformation:
    """`optax.adam` with u-muP's learning rates. A first `learning_rate` to try: 1."""
    return _chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        learning_rate,
        overrides=overrides,
    )


@checked
def adamw(
    learning_rate: LearningRate,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: LearningRate = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    independent_weight_decay: bool = True,
    overrides: Overrides | None = None,
) -> optax.GradientTransformation:
    """`optax.adamw` with u-muP's learning rates and independent weight decay.

    Each step takes `weight_decay` times the parameter from it, whatever its learning
    rate: the base rate, its schedule and the factors leave the decay alone, so that its
    optimum stays in place as they change. A schedule of its own is welcome as
    `weight_decay`. With `independent_weight_decay=False` the decay is multiplied by the
    parameter's learning rate as in `optax.adamw`, and would fade at growing width.

    Reference: u-muP (Blake et al., 2024), section 3 and figure 2.
    """
    return _chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        learning_rate,
        overrides=overrides,
        decay=(weight_decay, mask, independent_weight_decay),
    )


@checked
def lion(
    learning_rate: LearningRate,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: LearningRate = 0.0,
    mask: Any = None,
    *,
    independent_weight_decay: bool = True,
    overrides: Overrides | None = None,
) -> optax.GradientTransformation:
    """`optax.lion` with u-muP's learning rates, which are Adam's: a sign has scale one.

    Weight decay is independent, as in `adamw`, and none by default (optax's is 1e-3
    times the learning rate).

    Reference: munit Scaling (Narayan et al., 2025), which trains with it.
    """
    return _chain(
        optax.scale_by_lion(b1, b2, mu_dtype),
        learning_rate,
        overrides=overrides,
        decay=(weight_decay, mask, independent_weight_decay),
    )


@ft.partial(checked, but=["momentum"])  # which may be traced
def sgd(
    learning_rate: LearningRate,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    readout_constraint: Constraint | None = None,
    overrides: Overrides | None = None,
) -> optax.GradientTransformation:
    """`optax.sgd` with u-muP's learning rates, in its two readings.

    Where the readout is unconstrained, as `LinearReadout` is by default, every gradient
    has unit scale and the rule is Adam's. Under a constraint c the readout sends back
    c(1 / in, out^-1/2) in place of out^-1/2, which makes the gradients of all but its
    own parameters smaller: for `to_output_scale` by out^1/2 / in. So there a weight's
    rate *grows* with width, as in / fan_in^1/2: muP's rule for SGD. Give the readout's
    constraint as `readout_constraint`, and every rate makes up for what is lost. Under
    `to_output_scale`, which leaves the logits alone, both readings then make the same
    update.

    Raises:
        ValueError: in `init`, if there is a constraint and not one readout's weight.
    """

    def scaled(infos: Any) -> optax.GradientTransformation:
        if readout_constraint is None:
            return _scaled_by(adam_rule, infos)
        readouts = [
            info
            for info in jax.tree.leaves(infos)
            if info.role == "output" and info.fan_in
        ]
        if len(readouts) != 1:
            raise ValueError(
                "`readout_constraint` needs one weight with the role output, got "
                f"{len(readouts)}: leave it None and write the rule as "
                "`optax.chain(scale_by_umup(rule=...), optax.sgd(...))`."
            )
        return _scaled_by(sgd_rule(readouts[0], readout_constraint), infos)

    return optax.chain(
        _informed(scaled, overrides),
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
    )


@checked
def muon(
    learning_rate: LearningRate,
    *,
    ns_coeffs: Any = (3.4445, -4.775, 2.0315),
    ns_steps: ArrayLike = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    mu_dtype: Any = None,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps: ArrayLike = 1e-8,
    weight_decay: LearningRate = 0.0,
    mask: Any = None,
    independent_weight_decay: bool = True,
    overrides: Overrides | None = None,
) -> optax.GradientTransformation:
    """`optax.contrib.muon` for hidden weights, Adam for all others, at u-muP's rates.

    Muon's update is an orthogonal matrix, of spectral norm 1. A product with the weight
    fan_in^-1/2 w should change by rate (fan_out / fan_in)^1/2 in spectral norm, which
    is what Adam's factor does; so Muon's is fan_out^1/2 depth^-1/2.

    A weight of any shape is a matrix of its fan-in and fan-out, and one for each layer
    of a stack. Those without `fan_out` are left to Adam: embeddings, convolutions, and
    the kernels of recurrent cells, whose gates are one array in NNX and several in
    Linen. Weight decay is independent, as in `adamw`, and none by default.

    Reference: A Spectral Condition for Feature Learning (Yang et al., 2023), condition
    1. Its combination with u-muP's multipliers is derived here, not taken from there.
    """

    def made(infos: Any) -> optax.GradientTransformation:
        def matrices(leaves: Any) -> Any:
            return jax.tree.map(
                lambda x, info: x if _masked(x) else _matrix(x.shape, info),
                leaves,
                infos,
                is_leaf=_masked,
            )

        return optax.partition(
            {
                True: optax.contrib.scale_by_muon(
                    ns_coeffs,
                    ns_steps,
                    beta,
                    eps,
                    mu_dtype,
                    nesterov=nesterov,
                    adaptive=adaptive,
                    preconditioning=preconditioning,
                    weight_dimension_numbers=matrices,
                ),
                False: optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
            },
            jax.tree.map(_is_matrix, infos),
        )

    return _chain(
        _informed(made, overrides),
        learning_rate,
        rule=muon_rule,
        overrides=overrides,
        decay=(weight_decay, mask, independent_weight_decay),
    )


def _is_matrix(info: ParameterInfo) -> bool:
    return info.role == "weight" and info.fan_out is not None


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def sum_gradients(grads: Any, axis_name: AxisName) -> Any:
    """The gradients of the whole batch, from those of the pieces along the named axes.

    It is `lax.psum` in `pmap` and `vmap`. In `shard_map`, by default (`check_vma`), JAX
    has summed already the gradients of what all devices share, and a `psum` would
    multiply them by the number of devices: there they are returned as they are.
    """
    check_bound("axis_name", axis_name)
    return grads if sums_cotangents(axis_name) else lax.psum(grads, axis_name)


def multi_steps(
    optimiser: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
    """One update from the gradients of `every` batches, as if they were one batch.

    `optax.MultiSteps` averages by default, and would bring a unit-scaled gradient down
    by `every`^1/2. This sums, times `every`^-1/2, as each batch's gradients carry
    batch^-1/2 and the whole is `every` times as large. Who sums gradients in a loop of
    their own puts `optax.scale(every**-0.5)` in front instead.

    Raises:
        ValueError: if `every` is not a positive integer.
    """
    every = positive_integer("every", every)
    inner = optax.chain(optax.scale(every**-0.5), optimiser)
    steps = optax.MultiSteps(inner, every, use_grad_mean=False)
    return steps.gradient_transformation()


# -- How metadata, seen in `init` alone, reaches `update` ------------------------------


@ft.partial(
    jax.tree_util.register_dataclass, data_fields=["inner"], meta_fields=["infos"]
)
@dataclasses.dataclass(frozen=True)
class _Informed:
    """An optimiser's state and, as structure, the records of its parameters in order.

    Structure, not leaves: `nnx.Optimizer` hands `update` bare arrays without metadata.
    """

    inner: Any
    infos: tuple[ParameterInfo, ...]


def _informed(
    build: Callable[[Any], optax.GradientTransformation], overrides: Overrides | None
) -> optax.GradientTransformation:
    """The transformation that `build` makes from a tree of `ParameterInfo`s."""

    def of(tree: Any, infos: tuple[ParameterInfo, ...]) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        if len(leaves) != len(infos):
            raise ValueError(
                f"`updates` must have the {len(infos)} leaves of the parameters that "
                f"`init` saw, got {len(leaves)}."
            )
        return build(jax.tree.unflatten(structure, infos))

    def init(params: Any) -> _Informed:
        infos = tuple(info for _, info in named_parameters(params, overrides).values())
        return _Informed(of(params, infos).init(params), infos)

    def update(updates: Any, state: _Informed, params: Any = None) -> Any:
        updates, inner = of(updates, state.infos).update(updates, state.inner, params)
        return updates, _Informed(inner, state.infos)

    return optax.GradientTransformation(init, update)


def _scaled_by(rule: Rule, infos: Any, rate: Any = 1.0) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u, info: u * (rate * rule(info)), updates, infos
        )
    )


def _chain(
    direction: optax.GradientTransformation,
    learning_rate: LearningRate,
    *,
    rule: Rule = adam_rule,
    overrides: Overrides | None,
    decay: tuple[LearningRate, Any, bool] = (0.0, None, True),
) -> optax.GradientTransformation:
    """Updates at their rates, with independent decay behind them or other in front.

    `decay` is its rate, its mask, and whether it is independent.
    """
    decay_rate, mask, independent = decay
    if callable(learning_rate):
        rates = optax.chain(
            scale_by_umup(rule=rule, overrides=overrides),
            optax.scale_by_learning_rate(learning_rate),
        )
    else:
        # One multiplication of each parameter, as without factors.
        rates = _informed(lambda i: _scaled_by(rule, i, -learning_rate), overrides)
    if independent:
        decayed = optax.add_decayed_weights(_negative(decay_rate), mask)
        return optax.chain(direction, rates, decayed)
    return optax.chain(direction, optax.add_decayed_weights(decay_rate, mask), rates)


def _negative(rate: LearningRate) -> LearningRate:
    return (lambda step: -rate(step)) if callable(rate) else -rate


def _matrix(shape: tuple[int, ...], info: ParameterInfo) -> Any:
    """A weight's contracted and other axes, counted from its end: a stack is in front.

    Raises:
        ValueError: if fan-in and fan-out are not products of the last axes.
    """
    end, axes = len(shape), []
    for size in (info.fan_out, info.fan_in):
        start = end
        while math.prod(shape[start:end]) != size:
            if start == 0:
                raise ValueError(
                    f"a weight's last axes must make up its fan-in and, behind it, its "
                    f"fan-out, got shape {shape} for {info}."
                )
            start -= 1
        axes.append(tuple(range(start, end)))
        end = start
    return optax.contrib.MuonDimensionNumbers(axes[1], axes[0])
