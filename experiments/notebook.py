"""Builds and runs transforms.ipynb: `python -m experiments.notebook`.

The source is a script of cells, `notebooks/transforms.py`: `# %%` begins one, and
`# %% [markdown]` one of text. Needs the extra `notebook`.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

SOURCE = Path(__file__).parent / "notebooks" / "transforms.py"
NOTEBOOK = Path(__file__).parent / "transforms.ipynb"


def build(source: str) -> Any:
    """The notebook of a script's cells, not executed."""
    cells = []
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    for i, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if "[markdown]" in kind:
            cell = nbformat.v4.new_markdown_cell(
                re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
            )
        else:
            cell = nbformat.v4.new_code_cell(text.strip())
        cell["id"] = f"cell-{i}"  # by default random: each build would differ
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execute(notebook: Any) -> Any:
    """Runs all cells in an empty folder; raises at the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        found = nbformat.writes(client.execute())
    # Where a kernel pretends that a cell's source is, with its process's number.
    return nbformat.reads(
        re.sub(r"[^\s\"]*/ipykernel_\d+/\d+\.py", "cell.py", found), as_version=4
    )


if __name__ == "__main__":
    nbformat.write(execute(build(SOURCE.read_text())), NOTEBOOK)
    print(f"wrote {NOTEBOOK}")
