"""`python -m experiments.bert`: every precision side by side."""

import tyro

from . import PRESETS, __doc__ as about, run

if __name__ == "__main__":
    run(tyro.extras.overridable_config_cli(PRESETS, description=about))
