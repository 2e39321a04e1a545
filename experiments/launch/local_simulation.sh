#!/usr/bin/env bash
# A pod in miniature: several processes on this machine, each with simulated CPU devices, talking over loopback. Run from the repository.
#
#   experiments/launch/local_simulation.sh CONFIG[:ARG] WORKDIR [flags of vlm_jax.train, e.g. --config.stages.0.steps=10]
#   PROCESSES=4 DEVICES_PER_PROCESS=1 RESTARTS=3 PYTHON=python3.11 experiments/launch/local_simulation.sh ...
#
# To see what happens when a process dies: VLM_JAX_FAULT="loop.step:5@1=kill" (vlm_jax/faults.py lists the points).
set -euo pipefail

if [[ $# -lt 2 ]]; then
    sed -n '2,7p' "$0" | cut -c3-
    exit 78
fi
config=$1 workdir=$2
shift 2
exec "${PYTHON:-python}" -m vlm_jax.launch --processes "${PROCESSES:-2}" --devices_per_process "${DEVICES_PER_PROCESS:-4}" --restarts "${RESTARTS:-0}" \
    --heartbeat "${HEARTBEAT:-60}" -- python -m vlm_jax.train --config "$config" --workdir "$workdir" "$@"
