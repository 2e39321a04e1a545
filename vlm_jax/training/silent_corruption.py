"""Silent data corruption: a device that computes wrongly and says nothing.

Two checks, every `sdc_check_every` steps: the step is taken twice on the same inputs, which on one mesh gives the same bits; and arrays that lie on several
devices are the same on all of them. A step checked costs a second step and a second copy of the state.
TPUs have detectors of their own besides (`LIBTPU_INIT_ARGS`).
"""
from collections.abc import Callable
from typing import Any

import jax

from vlm_jax.errors import DivergedError
from vlm_jax.training.digests import digests
from vlm_jax.training.trees import flatten


def taken_twice(step: Callable, state: Any, batch: Any, number: Any) -> tuple[Any, Any]:
    """Returns `step(state, batch, number)` after having taken it twice and compared.

    Args:
      step: (state, batch, number) -> (state, metrics); it may donate the state.
      number: steps taken before this one.
    Raises:
      DivergedError: if the two results, or the copies of an array on several devices, differ in any bit.
    """
    first = digests(flatten(step(jax.tree.map(lambda leaf: leaf.copy(), state), batch, number)[0]))
    state, metrics = step(state, batch, number)
    leaves = flatten(state)
    second = digests(leaves)
    wrong = [f"{path} differs between two computations" for path in leaves if first[path] != second[path]] + differing_replicas(leaves)
    if wrong:
        raise DivergedError(f"step {int(number) + 1}: a device computed wrongly ({len(wrong)} arrays, first {wrong[0]}; process {jax.process_index()}, devices "
                            f"{', '.join(map(str, jax.local_devices()))}); take the machine out, and start again from the last checkpoint.")
    return state, metrics


def differing_replicas(leaves: dict[str, jax.Array]) -> list[str]:
    """Lines `PATH differs between DEVICE and DEVICE` for pieces of arrays that several devices of this process hold and that are not the same bits."""
    pieces: dict[tuple, list[tuple[str, Any]]] = {}
    data: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        for shard in leaf.addressable_shards if leaf.size else ():
            name = f"{path}@{shard.device.id}"
            data[name] = shard.data
            pieces.setdefault((path, str(shard.index)), []).append((name, shard.device))
    shared = {name for copies in pieces.values() if len(copies) > 1 for name, _ in copies}
    found = digests({name: data[name] for name in shared})
    return [f"{path} differs between {copies[0][1]} and {device}" for (path, _), copies in pieces.items() for name, device in copies[1:]
            if found[name] != found[copies[0][0]]]
