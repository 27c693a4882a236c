"""Measure the defences of encoders on planted ones: ACC, ASR and RA of both probes, one table.

    accelerate launch recipes/encoder_study.py recipes/grids/encoders_vit.yaml --dataset_name uoft-cs/cifar10
    accelerate launch recipes/encoder_study.py recipes/grids/encoders_vit.yaml --shard 0/2    # and 1/2, on the other core
    python recipes/encoder_study.py recipes/grids/encoders_vit.yaml --only '* | PAR | *'
    python recipes/encoder_study.py outputs/benchmark/encoders_vit/results.parquet            # tables again

A study that is stopped goes on where it was. Make the victims first: each grid says how.
"""

import sys

from d3_hf.cli import run
from d3_hf.commands.benchmark import run_encoders

if __name__ == "__main__":
    run(run_encoders, sys.argv[1:])
