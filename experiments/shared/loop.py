"""The training loop: a bar, metrics, checkpoints, and going on after a kill."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from .record import forget_after, log


def train_steps(
    out: Path,
    state: Any,
    advance: Callable[[Any, int], tuple[Any, jax.Array]],
    *,
    steps: int,
    checkpoint_every: int,
    name: str,
    progress: bool = True,
) -> Any:
    """Trains to the end, from the last checkpoint in `out` or from `state`.

    Args:
        out: the run's folder, for checkpoints and metrics.jsonl.
        state: a tree of arrays to start from.
        advance: (state, step) -> (state, loss in nats).
        steps: where the end is.
        checkpoint_every: a kill loses so many steps at most.
        name: what the bar calls the run.
        progress: whether to show the bar.

    Raises:
        ValueError: if the last checkpoint cannot be read.
    """
    # Written before the run goes on: a kill loses one interval at most.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    folder = out.resolve() / "checkpoints"
    with ocp.CheckpointManager(folder, options=options) as checkpoints:
        state, start = _latest(checkpoints, state)
        forget_after(out, start)
        with _bar(name, start, steps, progress) as show:
            for i in range(start, steps):
                state, value = advance(state, i)
                if i % 10 == 0 or i + 1 == steps:
                    bits = float(value) / math.log(2)
                    log(out, step=i, loss_bits=bits)
                    show(i + 1, bits)
                if (i + 1) % checkpoint_every == 0:
                    leaves = jax.tree.leaves(state)
                    checkpoints.save(i + 1, args=ocp.args.StandardSave(leaves))
    return state


def timed_steps(
    advance: Callable[[Any, int], tuple[Any, jax.Array]],
    state: Any,
    *,
    steps: int,
    settled: int = 5,
    seconds: float = math.inf,
    every: int = 50,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Any, list[float], float]:
    """Trains without waiting for a step: the next is handed over while one runs.

    Args:
        advance: (state, step) -> (state, loss).
        state: where to start.
        steps: how many at most.
        settled: steps before the clock starts.
        seconds: after so many no further `every` steps begin.
        every: after so many steps each their last is waited for, and shown.
        show: gets the step and its loss.

    Returns:
        The state, the losses, and the seconds of a step; NaN where too few were timed.
    """
    losses: list[Any] = []
    begun = start = time.perf_counter()
    for i in range(steps):
        if i == settled:
            jax.block_until_ready(state)
            start = time.perf_counter()
        state, value = advance(state, i)
        losses.append(value)
        if i % every == 0:
            show(i, float(value))
            if time.perf_counter() - begun > seconds:
                break
    jax.block_until_ready(state)
    timed = len(losses) - settled
    spent = (time.perf_counter() - start) / timed if timed > 0 else math.nan
    return state, [float(x) for x in losses], spent


def _latest(checkpoints: ocp.CheckpointManager, state: Any) -> tuple[Any, int]:
    """The last checkpoint and its step, or `state` and 0."""
    step = checkpoints.latest_step()
    if step is None:
        return state, 0
    leaves, structure = jax.tree.flatten(state)
    try:
        leaves = checkpoints.restore(step, args=ocp.args.StandardRestore(leaves))
    except Exception as e:  # whatever orbax or its storage makes of a broken file
        raise ValueError(
            f"the checkpoint {checkpoints.directory / str(step)} cannot be read "
            f"({type(e).__name__}: {str(e).splitlines()[0]}). Delete that folder to go "
            "on from the one before it."
        ) from e
    return jax.tree.unflatten(structure, leaves), step


@contextlib.contextmanager
def _bar(
    name: str, start: int, steps: int, show: bool
) -> Iterator[Callable[[int, float], None]]:
    """With the loss and the time that is left; yields show(steps done, bits)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]:.3f} bits"),
        TimeRemainingColumn(),
        disable=not show,
    )
    with bar:
        task = bar.add_task(name, total=steps, completed=start, bits=math.nan)
        yield lambda done, bits: bar.update(task, completed=done, bits=bits)
