"""Configurations by name: the paper's own, and shorter ones."""

from pathlib import Path

from .search import Search
from .sweep import Config

# float16's search begins around float32's best rate, and each ends where it gets worse.
SHORT = Search(regular_log2_rate=-11, unit_log2_rate=-7, count=5, worse=0.0)
PRESETS: dict[str, tuple[str, Config]] = {
    "table": ("The paper's second table, at its number of steps: days.", Config()),
    "figure": (
        "Its figure 4, of all norms, residual weights and optimisers: weeks.",
        Config(
            out=Path("runs/paper_figure"),
            preset="figure",
            precisions=("float32", "float16"),
            seeds=1,
            search=Search(worse=0.05),
        ),
    ),
    "gpu": (
        "The table's settings in minutes of a GPU.",
        Config(
            out=Path("runs/paper_gpu"),
            steps=800,
            recurrent_steps=300,
            search=SHORT,
            unroll=8,
            compilers=6,
        ),
    ),
    "smoke": (
        "All of it in small: a minute or two of a CPU.",
        Config(
            out=Path("runs/paper_smoke"),
            search=Search(-8, -4, count=2, near=1, worse=0.0),
            mixers=("conv",),
            seeds=1,
            steps=20,
            batch=2,
            length=32,
            overlap=4,
            steps_at_once=10,
            eval_batch=2,
            eval_characters=256,
            width=16,
            depth=1,
        ),
    ),
}
