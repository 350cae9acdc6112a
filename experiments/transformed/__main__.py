"""`python -m experiments.transformed`: see `train.py`."""

import tyro

from .train import TransformedConfig, compare

if __name__ == "__main__":
    compare(tyro.cli(TransformedConfig))
