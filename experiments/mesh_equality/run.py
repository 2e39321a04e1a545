"""Trains one small SigLIP on many meshes, in one, two and four processes, and compares gradients and losses with one device.

    python -m experiments.mesh_equality.run

Every run is made of what `vlm_jax.train` trains with (`training/setup.py`: data, mesh, layout, optimiser, the compiled step), in processes of its own, in
float32 at the highest matmul precision.
"""
import argparse
from importlib.metadata import version
import json
import math
import os
from pathlib import Path
import socket
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
CONFIG = "configs/siglip/shapes.py:variant=test"
STEPS, BATCH, UNEVEN, SIZE = 50, 16, 14, 32
BAR = 1e-5                      # the promise of docs/architecture.md: relative, over the first 50 steps
ONE = dict(mesh={"data": 1})


def _run(mesh: dict[str, int], layout: str = "replicated", **more: Any) -> dict[str, Any]:
    return {"mesh": mesh, "layout": layout, **more}


# Each is compared with one device on the same batch. Pictures have 16 tokens, texts 16; 2 heads, so that tensor=4 has to leave attention whole.
RUNS: list[dict[str, Any]] = [
    _run({"data": 8}),
    _run({"data": 4, "slices": 2, "fsdp": 2}, "fsdp"),
    _run({"data": 1, "fsdp": 8}, "fsdp"),
    _run({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor"),
    _run({"data": 2, "tensor": 4}, "tensor"),
    _run({"data": 2, "sequence": 4}),
    _run({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, "fsdp_tensor"),
    _run({"data": 2, "fsdp": 4}, "fsdp", batch=UNEVEN),
    _run({"data": 4, "fsdp": 1, "tensor": 2}, "tensor", batch=UNEVEN, processes=2),
    _run({"data": 8}, processes=2),
    _run({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor", processes=2),
    _run({"data": 2, "fsdp": 4}, "fsdp", processes=4),
    _run({"data": 2, "tensor": 4}, "tensor", processes=4),      # two processes hold the same rows
    _run({"data": 2, "fsdp": 2, "sequence": 2}, "fsdp", processes=4),
]


def config_of(run: dict[str, Any], steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """The test variant of the shapes config with pictures of 16 tokens, on the mesh and in the layout of `run`."""
    from vlm_jax.settings import plain
    from vlm_jax.sharding import layout
    from vlm_jax.training.config import load_config
    config = plain(load_config(CONFIG))
    config.update(mesh=run["mesh"], sharding=layout(run.get("layout", "replicated"))["sharding"], seed=seed, log_every=1, evaluations={},
                  checkpoint={"every": steps, "keep": 1}, dtypes={"params": "float32", "compute": "float32", "softmax": "float32"})
    config["model"]["image"] = {"image_size": SIZE}
    for operation, settings in config["processor"]["image"]:
        if operation == "resize":
            settings["size"] = SIZE
    stage = config["stages"][0]
    stage["steps"] = steps
    stage["data"]["pairs"]["batch_size"] = run.get("batch", BATCH)
    return config


def measure(config: dict[str, Any], devices=None, train: bool = True) -> tuple[list[float], dict[str, np.ndarray]]:
    """(losses of all steps of the first stage, {parameter: gradient of the first step}) of a config on the devices of all processes.

    With `train=False` no step is taken, and the only loss is that of the first batch.
    """
    import jax

    from vlm_jax.sharding import put_batch, replicated
    from vlm_jax.training import setup
    from vlm_jax.training.config import resolve
    from vlm_jax.training.gradients import value_and_gradients
    from vlm_jax.training.trees import flatten
    config = resolve(config)
    parts = setup.build(config, 0, setup.read(config), devices)
    losses, gradients = [], {}
    rng = jax.random.fold_in(jax.random.key(config["seed"]), 0)
    first = jax.jit(lambda state, batch: value_and_gradients(parts.task)(state["params"], state["task"], batch, rng, 0), out_shardings=replicated(parts.mesh))
    with jax.set_mesh(parts.mesh):
        state = parts.initial_state()
        for step, host_batch in zip(range(parts.last), parts.batches(0)):
            batch = put_batch(host_batch, parts.mesh)
            if step == 0:
                (loss, _, _), gradients = jax.block_until_ready(first(state, batch))
                gradients = {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}
                if not train:
                    return [float(loss)], gradients
            state, metrics = parts.step(state, batch, np.int32(step))
            jax.block_until_ready(state)     # simulated devices: the collectives of one program at a time
            losses.append(float(metrics["loss"]))
    return losses, gradients


def run_apart(run: dict[str, Any], steps: int, seed: int, timeout: float = 1800) -> tuple[list[float], dict[str, np.ndarray]]:
    """What `measure` returns for a run on simulated devices, in processes of its own."""
    processes = run.get("processes", 1)
    devices = math.prod(size for axis, size in run["mesh"].items() if axis != "slices")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # More threads than devices (PJRT_NPROC): with one each, seven that wait in a collective can starve the product that the eighth is computing.
        # Compiling is what these short runs cost, hence without LLVM's optimisations.
        environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_DEFAULT_MATMUL_PRECISION="highest", PJRT_NPROC="32",
                           XLA_FLAGS=f"--xla_force_host_platform_device_count={devices // processes} --xla_backend_optimization_level=0 "
                                     "--xla_llvm_disable_expensive_passes=true --xla_cpu_collective_call_terminate_timeout_seconds=600")
        children = []
        try:
            for number in range(processes):
                job = json.dumps([run, f"127.0.0.1:{port}", number, folder, steps, seed])
                with open(os.path.join(folder, f"{number}.log"), "w") as log:
                    children.append(subprocess.Popen([sys.executable, "-m", "experiments.mesh_equality.run", "--child", job], env=environment,
                                                     cwd=FOLDER.parents[1], stdout=log, stderr=subprocess.STDOUT))
            codes = [child.wait(timeout) for child in children]
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
        if any(codes):
            failed = next(number for number, code in enumerate(codes) if code)
            raise RuntimeError(f"the run on {run} failed in process {failed}:\n{Path(folder, f'{failed}.log').read_text()[-3000:]}")
        losses = [json.loads(Path(folder, f"{number}.json").read_text()) for number in range(processes)]
        if any(other != losses[0] for other in losses):
            raise RuntimeError(f"the run on {run}: the processes report different losses.")
        with np.load(os.path.join(folder, "gradients.npz"), allow_pickle=False) as gradients:
            return losses[0], {path.replace("|", "/"): gradients[path] for path in gradients}


def _child(run: dict[str, Any], coordinator: str, number: int, folder: str, steps: int, seed: int) -> None:
    if run.get("processes", 1) > 1:
        from vlm_jax import distributed
        distributed.start(coordinator, run["processes"], number)
    losses, gradients = measure(config_of(run, steps, seed))
    Path(folder, f"{number}.json").write_text(json.dumps(losses))
    if number == 0:
        np.savez(os.path.join(folder, "gradients.npz"), **{path.replace("/", "|"): leaf for path, leaf in gradients.items()})


def largest_difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def gradient_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest over parameters of |a - b| / |a| in the Euclidean norm.

    The gradient of a key's bias is zero but for rounding (softmax does not see it), so |a| counts at least as a thousandth of the whole gradient.
    """
    assert one.keys() == other.keys()
    least = 1e-3 * math.sqrt(sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in one.values()))
    return max(float(np.linalg.norm((one[path] - other[path]).astype(np.float64)) / max(np.linalg.norm(one[path].astype(np.float64)), least)) for path in one)


def main(steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Trains on all meshes, compares with one device and writes results.json; returns its metrics."""
    from experiments.results import write_results
    references = {batch: run_apart(dict(ONE, batch=batch), steps, seed) for batch in (BATCH, UNEVEN)}
    rows = []
    for run in RUNS:
        losses, gradients = references[run.get("batch", BATCH)]
        found, found_gradients = run_apart(run, steps, seed)
        row = dict(run, first_loss=found[0], last_loss=found[-1], loss_difference=largest_difference(losses, found),
                   gradient_difference=gradient_difference(gradients, found_gradients))
        rows.append(row)
        said = " ".join(f"{axis}={size}" for axis, size in run["mesh"].items())
        print(f"{said:40} {run['layout']:12} processes {run.get('processes', 1)}  batch {run.get('batch', BATCH)}: loss {found[0]:.6f} -> {found[-1]:.6f}, "
              f"largest difference {row['loss_difference']:.2e}, of the gradient {row['gradient_difference']:.2e}", flush=True)
    metrics = {"max_loss_difference": max(row["loss_difference"] for row in rows), "max_gradient_difference": max(row["gradient_difference"] for row in rows),
               "processes": max(run.get("processes", 1) for run in RUNS)}
    within = max(metrics["max_loss_difference"], metrics["max_gradient_difference"]) <= BAR
    print(f"loss {metrics['max_loss_difference']:.2e}, gradient {metrics['max_gradient_difference']:.2e} ({'within' if within else 'ABOVE'} {BAR})")
    write_results(FOLDER, metrics, seeds=(seed,), hardware={"jax": version("jax"), "devices": "1 to 8 simulated CPU devices in 1, 2 and 4 processes"},
                  config=CONFIG, steps=steps, batch_size=BATCH, uneven_batch_size=UNEVEN, runs=rows)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*json.loads(options.child))
    else:
        main(seed=options.seed)
