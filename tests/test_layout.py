"""The architecture: which floor each file is on, and what it may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jax_unit_scaling"
# A file imports from floors below its own, or from a sibling.
FLOORS = [
    {"scale", "constraints", "moments", "formats"},
    {"_jaxpr", "arguments", "op", "parameters"},
    {"ops", "fp8"},
    {"layers"},
    {"nnx", "linen", "transforms"},
    {"analysis", "compiled", "optim"},
    {"__init__"},
]
# Each framework has one door.
DOORS = {
    "flax": {"nnx", "linen", "transforms"},
    "optax": {"optim"},
    "matplotlib": {"analysis"},
    "rich": {"analysis"},
}
FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))


def _room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _floor(room: str) -> int:
    (floor,) = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    return floor


def _imports(path: Path) -> list[tuple[int, str]]:
    """Each import of the file: the dots before it, and the module."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or node.names[0].name))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_from_floors_below_or_from_a_sibling(path):
    own = _floor(_room(path))
    for level, module in _imports(path):
        if level == 0:
            top = module.split(".")[0]
            assert top != "jax_unit_scaling", f"{path} imports the package root"
            assert _room(path) in DOORS.get(top, {_room(path)}), f"{path}: {module}"
            assert not module.startswith("jax._src"), f"{path} imports {module}"
            extends = module.startswith("jax.extend")
            assert not extends or _room(path) == "_jaxpr", f"{path}: {module}"
        elif level == len(path.parts):  # from the package's top folder
            assert _floor(module.split(".")[0]) <= own, f"{path} imports {module}"


def test_importing_the_package_needs_no_extra_and_traces_nothing():
    code = (
        "import sys, jax, jax_unit_scaling\n"
        "assert not {'matplotlib', 'rich.table', 'tyro', 'orbax.checkpoint', 'chex'}"
        " & {m for m in sys.modules} - {'rich.table', 'orbax.checkpoint', 'chex'}\n"
        "from jax_unit_scaling import moments\n"
        "assert moments.moments.cache_info().misses == 0\n"
        "assert 'linen' in dir(jax_unit_scaling)\n"
        "assert 'jax_unit_scaling.linen' not in sys.modules\n"
        "assert jax_unit_scaling.linen.Dense is jax_unit_scaling.linen.Dense\n"
        "assert not hasattr(jax_unit_scaling, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
