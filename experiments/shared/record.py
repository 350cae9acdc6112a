"""What a run leaves behind: its configuration, its metrics, and lines of results."""

import contextlib
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax


def environment() -> dict[str, str]:
    """What a result may depend on, and the command that made it."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown; the first row's names head its columns."""
    heads = [*rows[0]]
    lines = [heads, ["---"] * len(heads), *([*row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claim(out: Path, run: Mapping[str, Any]) -> None:
    """Writes down in config.json what the folder holds, or checks that it is that run.

    Raises:
        ValueError: if it holds another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = as_json(run)
    path = out / "config.json"
    if not path.exists():
        path.write_text(json.dumps({**run, **environment()}, indent=1))
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e}. Delete this folder.") from e
    _check_same(found, run, f"`out` {out} holds a run", "folder, or delete this one")


def as_json(value: Any) -> Any:
    """`value` as JSON would give it back, with paths as strings."""
    return json.loads(json.dumps(value, default=str))


def _check_same(
    found: Mapping[str, Any], run: Mapping[str, Any], holds: str, choose: str
) -> None:
    for name, value in run.items():
        if found.get(name) != value:
            raise ValueError(
                f"{holds} of another {name}: {found.get(name)!r}, not {value!r}. "
                f"Choose another {choose}."
            )


def log(out: Path, **metrics: float) -> None:
    """Adds a line to the metrics.jsonl of a run's folder."""
    append_lines(out / "metrics.jsonl", [metrics])


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, without a line that a kill cut short."""
    records = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def forget_after(out: Path, step: int) -> None:
    """Drops the metrics of steps that are about to be repeated."""
    path = out / "metrics.jsonl"
    if path.exists():
        kept = [r for r in read_metrics(out) if r["step"] < step]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))


def open_lines(path: Path, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results in a file so far; begins it with what they share, if it is new.

    A line that a kill cut short is dropped, so that the next goes on a line of its own.

    Raises:
        ValueError: if the file holds results that share something else.
    """
    shared = as_json(shared)
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(shared) + "\n")
        return []
    if whole != text:
        path.write_text(whole)
    found, lines = read_lines(path)
    _check_same(found, shared, f"`out` has {path} with runs", "folder, or delete it")
    return lines


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds a line for each record."""
    with path.open("a") as f:
        f.write("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all results of a file share, and the results."""
    shared, *records = map(json.loads, path.read_text().splitlines())
    return shared, records
