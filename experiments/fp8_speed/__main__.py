import tyro

from .run import SpeedConfig, run

run(tyro.cli(SpeedConfig))
