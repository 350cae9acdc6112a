"""`python -m experiments.fp8_out_of_the_box cpu` (or `nanogpt`)."""

import tyro

from ..transformed.train import compare
from . import __doc__ as about
from .run import NANOGPT, GPTConfig

PRESETS = {
    "cpu": ("A small GPT: some minutes of a CPU.", GPTConfig()),
    "nanogpt": ("nanoGPT's size: some minutes of a GPU.", NANOGPT),
}

if __name__ == "__main__":
    compare(tyro.extras.overridable_config_cli(PRESETS, description=about))
