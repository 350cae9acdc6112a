"""What unit scaling costs beside plain Flax: `python -m experiments.overhead`.

Without tyro: `python -c "from experiments.overhead.run import OverheadConfig, run;
run(OverheadConfig(device='gpu'))"`.
"""

import tyro

from .run import OverheadConfig, run

if __name__ == "__main__":
    run(tyro.cli(OverheadConfig, description=__doc__))
