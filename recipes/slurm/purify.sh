#!/usr/bin/env bash
# One purification on two machines: sbatch recipes/slurm/purify.sh CONFIG --option value ...
# Requeued, the job goes on from its last checkpoint, or from the beginning if it had none yet.
#SBATCH --job-name=d3-purify
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    set -- "$@" --resume_from_checkpoint true
fi
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
CONFIGURATION=$(d3-hf recipes accelerate/multi_node)
export MAIN_ADDRESS CONFIGURATION
# shellcheck disable=SC2016  # the task's own shell fills in its rank
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --config_file "$CONFIGURATION" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" -m d3_hf.cli purify "$@" --save_strategy epoch --save_total_limit 2' purify "$@"
