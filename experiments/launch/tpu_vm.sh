#!/usr/bin/env bash
# One TPU VM (v5litepod-8, v6e-8, ...): run this on the VM, in the repository, inside tmux or a systemd unit.
#
#   experiments/launch/tpu_vm.sh CONFIG[:ARG] WORKDIR [flags of vlm_jax.train]
#
# One process drives all chips of the VM. The launcher starts it again after a preemption (75), a hang (77) or a signal, never after an error of config,
# data, checkpoint or divergence. WORKDIR may be gs://BUCKET/run; a spot VM loses its disk with itself.
set -euo pipefail

config=${1:?CONFIG[:ARG]} workdir=${2:?WORKDIR}
shift 2
exec "${PYTHON:-python3}" -m vlm_jax.launch --restarts "${RESTARTS:-100}" -- python -m vlm_jax.train --config "$config" --workdir "$workdir" "$@"
