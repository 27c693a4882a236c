"""Run the blind study of `--defence auto`: every recipe of the ladder on victims x retain sets x seeds, and what rules choose.

    accelerate launch recipes/auto_study.py recipes/grids/auto.yaml --dataset_name uoft-cs/cifar10
    accelerate launch recipes/auto_study.py recipes/grids/auto.yaml --shard 0/4    # ... 3/4, on machines that share the folder
    python recipes/auto_study.py recipes/grids/auto.yaml --only '*/blended | 500 images | *'
    python recipes/auto_study.py outputs/benchmark/auto/results.parquet            # tables again

A study that is stopped goes on where it was. Make the victims first: recipes/make_victim.py --set recipes/victims.yaml.
"""

import sys

from d3_hf.cli import run
from d3_hf.commands.benchmark import run_study

if __name__ == "__main__":
    run(run_study, sys.argv[1:])
