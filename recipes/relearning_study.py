"""Purify, and measure how fast each purified model relearns its backdoor, beside a twin that never had one.

    accelerate launch recipes/relearning_study.py recipes/grids/relearning.yaml --dataset_name uoft-cs/cifar10
    python recipes/relearning_study.py recipes/grids/relearning.yaml --only '* | FT | *'
    python recipes/relearning_study.py outputs/benchmark/relearning/results.parquet            # tables again

A study that is stopped goes on where it was. Make the victims first, the twin of their group among them.
"""

import sys

from d3_hf.cli import run
from d3_hf.commands.benchmark import run_relearning

if __name__ == "__main__":
    run(run_relearning, sys.argv[1:])
