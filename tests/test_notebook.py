"""The executed notebook: what is stored is what its source gives."""

import ast
import json
import re
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NOTEBOOK = json.loads((EXPERIMENTS / "transforms.ipynb").read_text())
CODE = [c for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]


def test_the_stored_notebook_was_executed_from_top_to_bottom():
    assert [c["execution_count"] for c in CODE] == list(range(1, len(CODE) + 1))
    outputs = [o for c in CODE for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    assert len(json.dumps(NOTEBOOK)) < 1.5e6


def test_it_is_the_script_of_cells():
    source = (EXPERIMENTS / "notebooks" / "transforms.py").read_text()
    cells = re.split(r"^# %%.*\n", source, flags=re.MULTILINE)[1:]
    stored = ["".join(c["source"]) for c in NOTEBOOK["cells"]]
    assert len(cells) == len(stored)
    for text, cell, kept in zip(cells, NOTEBOOK["cells"], stored, strict=True):
        if cell["cell_type"] == "code":
            ast.parse(kept)
            assert kept == text.strip()
        else:
            assert kept == re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
    assert "colab.research.google.com" in stored[0] and '"pip"' in stored[1]


@pytest.mark.slow
def test_it_runs():
    from experiments.notebook import SOURCE, build, execute

    found = execute(build(SOURCE.read_text()))
    code = [c for c in found["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in code)
