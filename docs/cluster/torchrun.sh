#!/usr/bin/env bash
# One run on all GPUs of one machine, or of several. From the repository's folder, the environment active:
#
#   bash docs/cluster/torchrun.sh experiment=ddpm/cifar10 trainer=gpu
#
# Several machines: the same on each, with NODES=2 HOST=<the first one's name> set, at about the same time.
# Started again after an interruption it goes on with the same run.
set -euo pipefail

nodes="${NODES:-1}"
# a free port where there is one machine; an agreed one otherwise
endpoint="${HOST:-localhost}:${PORT:-$([ "$nodes" = 1 ] && echo 0 || echo 29400)}"

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$nodes" --nproc-per-node="${PER_NODE:-gpu}" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="${JOB:-diffusion_lab}" \
    train.py resume=auto "$@"
