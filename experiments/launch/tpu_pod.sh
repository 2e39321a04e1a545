#!/usr/bin/env bash
# A slice of several hosts: run this on your own machine; it starts one process on every host.
#
#   NAME=my-pod ZONE=us-west4-a experiments/launch/tpu_pod.sh CONFIG[:ARG] gs://BUCKET/run [flags of vlm_jax.train]
#   NAME=my-pod ZONE=us-west4-a experiments/launch/tpu_pod.sh logs | status | stop
#
# Made beforehand, for example:
#   gcloud compute tpus tpu-vm create my-pod --zone=us-west4-a --accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite
#   gcloud compute tpus tpu-vm ssh my-pod --zone=us-west4-a --worker=all --command="git clone REPOSITORY vlm_jax && pip install -e './vlm_jax[tpu]'"
#
# The processes find each other by what the VMs' metadata say. If one host is lost all end (76), their launchers start them again, and they wait for it.
# The commands go on when this machine disconnects; each host writes ~/vlm_jax.log.
set -euo pipefail

name=${NAME:?NAME of the TPU} zone=${ZONE:?ZONE of the TPU} folder=${FOLDER:-vlm_jax}
everywhere() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="${WORKER:-all}" --command="$1"
}

case ${1:?CONFIG[:ARG], or logs, status, stop} in
    logs) WORKER=${WORKER:-0} everywhere "tail -n 50 -f vlm_jax.log" ;;
    status) everywhere "if [ -e vlm_jax.pid ] && kill -0 \$(cat vlm_jax.pid) 2>/dev/null; then echo runs; else echo 'does not run'; fi; tail -n 1 vlm_jax.log" ;;
    stop) everywhere "kill -TERM \$(cat vlm_jax.pid)" ;;    # all save the same step and exit with 75; the launchers pass it on and do not start again
    *)
        config=$1 workdir=${2:?WORKDIR, gs://BUCKET/run: all hosts write there}
        shift 2
        command=$(printf '%q ' python3 -m vlm_jax.launch --restarts "${RESTARTS:-100}" -- python -m vlm_jax.train --config "$config" --workdir "$workdir" "$@")
        everywhere "cd $folder && { nohup $command >> ~/vlm_jax.log 2>&1 < /dev/null & echo \$! > ~/vlm_jax.pid; }"
        ;;
esac
