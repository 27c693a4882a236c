"""Purify victims of a zoo, and read them as `d3-hf check` does before and after: is the class that stood out still there?

    accelerate launch recipes/after_study.py recipes/grids/after.yaml --dataset_name uoft-cs/cifar10
    python recipes/after_study.py recipes/grids/after.yaml --only 'zoo-judge/badnets-1 | *'
    python recipes/after_study.py outputs/benchmark/after/results.parquet            # tables again

A study that is stopped goes on where it was. Run the zoo's study first, recipes/assurance_study.py: its twins are the null.
"""

import sys

from d3_hf.cli import run
from d3_hf.commands.benchmark import run_after

if __name__ == "__main__":
    run(run_after, sys.argv[1:])
