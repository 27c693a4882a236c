"""Run a benchmark grid: victims x retain sets x defences x seeds.

    accelerate launch recipes/benchmark.py recipes/grids/cpu.yaml --dataset_name uoft-cs/cifar10
    accelerate launch recipes/benchmark.py recipes/grids/cpu.yaml --shard 0/4      # ... 3/4, on machines that share the folder
    python recipes/benchmark.py outputs/benchmark/cpu/results.parquet              # tables and plots again

Same as `d3-hf benchmark`. Make the victims first: recipes/make_victim.py --set recipes/victims.yaml.
"""

import sys

from d3_hf.cli import COMMANDS, run

if __name__ == "__main__":
    run(COMMANDS["benchmark"], sys.argv[1:])
