#!/bin/bash
# Several machines without Slurm and without accelerate's launcher. Run the same command on each, here with 2 machines and 8 GPUs:
#
#   NODES=2 GPUS=8 HEAD=node0:29500 bash accelerate_configs/torchrun.sh scripts/configs/full.yaml --output_dir out/full
#
# When a worker dies, torchrun ends the others, restarts all of them, at most three times, and they resume from the newest complete
# checkpoint. --output_dir must be on a disk that all machines share. The engine is DistributedDataParallel.

set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # else restarted workers look for dead ones (torch 2.13)
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:29500}" --rdzv-id "${RUN:-dpo}" --max-restarts 3 \
    scripts/dpo.py "$@" --resume_from_checkpoint auto
