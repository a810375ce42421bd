#!/bin/bash
# Two machines with 8 GPUs each under Slurm, from the checkout:
#
#   sbatch accelerate_configs/slurm.sh scripts/configs/full.yaml --output_dir out/full
#
# --output_dir must be on a disk that all machines share. Five minutes before the time limit, the run gets a signal: it finishes its step,
# saves and stops, and the job is queued again. The launcher gives it 30 s. If a step and a save take longer, the run resumes from
# the last checkpoint of --save_steps. After any end, the same command resumes from the newest complete checkpoint.
#
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # else restarted workers look for dead ones (torch 2.13)
gpus=8
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# CONFIG=accelerate_configs/fsdp2.yaml sbatch ... uses another engine.
srun --kill-on-bad-exit=0 accelerate launch \
    --config_file "${CONFIG:-accelerate_configs/multi_node.yaml}" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * gpus))" \
    --rdzv_backend c10d --main_process_ip "$head" --main_process_port 29500 --max_restarts 3 \
    scripts/dpo.py "$@" --resume_from_checkpoint auto &
job=$!

# Only this shell gets USR1. It sends TERM to srun, which passes it to the launchers, and these to their workers.
stopping=
trap 'stopping=1; kill -TERM "$job"' USR1
code=0
wait "$job" || code=$?
if [ -n "$stopping" ]; then
    wait "$job" || true   # the trap ended the first wait; saving may take a while
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
