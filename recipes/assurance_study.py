"""Measure how often `d3-hf check` is right: every model of a zoo read as check reads it, then hit and false-alarm rates.

    accelerate launch recipes/assurance_study.py recipes/grids/zoo.yaml --dataset_name uoft-cs/cifar10
    accelerate launch recipes/assurance_study.py recipes/grids/zoo.yaml --shard 0/2    # and 1/2, on the other core
    python recipes/assurance_study.py recipes/grids/zoo.yaml --only 'zoo-calibrate/*'
    python recipes/assurance_study.py outputs/benchmark/zoo/results.parquet            # tables again

A study that is stopped goes on where it was. Make the models first: recipes/make_victim.py --set recipes/zoo.yaml. The
rates that `check` prints are those of d3_hf/inspection/measured.json: copy the one there that is written beside the tables.
"""

import sys

from d3_hf.cli import run
from d3_hf.commands.benchmark import run_zoo

if __name__ == "__main__":
    run(run_zoo, sys.argv[1:])
