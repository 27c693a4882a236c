#!/usr/bin/env bash
# A grid shared by eight tasks that know nothing of each other: sbatch recipes/slurm/benchmark.sh GRID --dataset_name uoft-cs/cifar10
# Start it again after a failure: cells that exist and verify are skipped. results.parquet holds all once the last task has ended.
#SBATCH --job-name=d3-benchmark
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --time=08:00:00
set -euo pipefail
d3-hf benchmark "$@" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
