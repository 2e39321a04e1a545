#!/usr/bin/env bash
# Several slices over the data-centre network, as one queued resource: run this on your own machine.
#
#   NAME=my-slices ZONE=us-east5-b SLICES=4 TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite experiments/launch/tpu_multislice.sh create
#   NAME=my-slices ZONE=us-east5-b SLICES=4 experiments/launch/tpu_multislice.sh setup "git clone REPOSITORY vlm_jax && pip install -e './vlm_jax[tpu]'"
#   NAME=my-slices ZONE=us-east5-b SLICES=4 experiments/launch/tpu_multislice.sh run CONFIG:topology=v5e:16x16*4 gs://BUCKET/run [flags of vlm_jax.train]
#   NAME=my-slices ZONE=us-east5-b SLICES=4 experiments/launch/tpu_multislice.sh stop | delete
#
# The mesh of a topology with *4 spans the slices by its axis `data` only: over the slow network goes one reduction of the gradient a step. Who belongs to which
# slice is in the metadata of the VMs (MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID, MEGASCALE_COORDINATOR_ADDRESS), where JAX and vlm_jax read it.
# On GKE a JobSet sets the same variables in the environment; there `python -m vlm_jax.train ...` is the whole command of the container.
set -euo pipefail

name=${NAME:?NAME of the queued resource} zone=${ZONE:?ZONE} slices=${SLICES:?SLICES, how many}
here=$(dirname "$0")

on_every_slice() {      # all at once: each waits for the others
    local children=() failed=0
    for ((slice = 0; slice < slices; slice++)); do
        "$@" "$name-$slice" &
        children+=($!)
    done
    for child in "${children[@]}"; do wait "$child" || failed=$?; done
    return "$failed"
}
pod() {     # arguments of tpu_pod.sh, then the name of a slice
    NAME=${*: -1} ZONE=$zone "$here/tpu_pod.sh" "${@:1:$#-1}"
}
shell() {
    gcloud compute tpus tpu-vm ssh "$2" --zone="$zone" --worker=all --command="$1"
}

case ${1:?create, setup, run, stop or delete} in
    create)
        gcloud compute tpus queued-resources create "$name" --zone="$zone" --node-count="$slices" --node-prefix="$name" \
            --accelerator-type="${TYPE:?TYPE, e.g. v5litepod-256}" --runtime-version="${VERSION:?VERSION, e.g. v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
        echo "wait until it is ACTIVE: gcloud compute tpus queued-resources describe $name --zone=$zone"
        ;;
    setup) on_every_slice shell "${2:?the command}" ;;
    run) shift; on_every_slice pod "$@" ;;
    stop) on_every_slice pod stop ;;
    delete) gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ;;
    *) echo "$1: create, setup, run, stop or delete" >&2; exit 78 ;;
esac
