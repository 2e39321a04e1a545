"""How long a save stalls the loop, beyond its allowance, and how long a resumed run takes to its first step.

    python -m experiments.bench_checkpoint.run

The allowance is one step or 100 ms, whichever is longer, plus the saved bytes at 1 GB/s. The loop's next step after a save is timed with it: what the
save leaves to the devices counts. The resume is that of the demo's config, by the ordinary command in a process of its own.
"""
import argparse
import json
import math
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

FOLDER = Path(__file__).parent
CONFIG = "configs/siglip/emoji.py"
BALLAST_MB = (0, 100, 1000)     # arrays beside the real training state, so that larger models are measured with the same step
STEPS_BEFORE, SAVES = 3, 4


def stall(ballast_mb: int, batch_size: int, folder: str) -> dict[str, float]:
    """Runs the config's own training step with a save between steps; returns medians and the worst stall, in seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vlm_jax.settings import plain
    from vlm_jax.sharding.mesh import put_batch
    from vlm_jax.training import run_identity, setup
    from vlm_jax.training.checkpoints import Checkpoints
    from vlm_jax.training.config import load_config, resolve

    config = plain(load_config(CONFIG))
    for stream in config["stages"][0]["data"].values():
        stream["batch_size"] = batch_size
    config = resolve(config)
    parts = setup.build(config, 0, setup.read(config))
    state = parts.initial_state()
    count = ballast_mb // 50        # arrays of 50 MB
    ballast = {f"array{n}": jnp.asarray(np.random.default_rng(n).normal(size=12_500_000).astype(np.float32)) for n in range(count)}
    batch = put_batch(next(parts.batches(0)), parts.mesh)
    metadata = {"run": run_identity.describe(config, 0, parts.processor.digest)}
    step_seconds, stalls, returned = [], [], []
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves((state, ballast)))
    with jax.set_mesh(parts.mesh), Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.prepare(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                                         {"train": state, "ballast": ballast}))
        number = 0

        def step() -> float:
            nonlocal state, number
            began = time.perf_counter()
            state, facts = parts.step(state, batch, np.int32(number))
            jax.block_until_ready((state, facts))
            number += 1
            return time.perf_counter() - began
        step()
        time.sleep(15)      # the digests compile in the background, as they do while the first steps of a run are taken
        for save in range(SAVES):
            step_seconds += [step() for _ in range(STEPS_BEFORE)]
            began = time.perf_counter()
            checkpoints.save(save + 1, {"train": state, "ballast": ballast}, metadata)
            returned.append(time.perf_counter() - began)
            step()
            stalls.append(time.perf_counter() - began)
            checkpoints.wait()      # the background has its own time here: with a save every few minutes it has it in a run, too
    usual = statistics.median(step_seconds)
    allowance = max(usual, 0.1) + saved / 1e9
    lost = [seconds - usual for seconds in stalls]
    return {"megabytes": saved / 1e6, "step_seconds": usual, "save_returned_seconds": statistics.median(returned), "stall_seconds": statistics.median(lost),
            "worst_stall_seconds": max(lost), "first_stall_seconds": lost[0], "allowance_seconds": allowance,
            "stall_seconds_minus_allowance": max(lost) - allowance}


def resume(batch_size: int, workdir: str) -> float:
    """Trains the demo's config for two steps, starts the same command again for a third, and returns the seconds from its start to the third step."""
    def command(steps: int) -> list[str]:
        return [sys.executable, "-u", "-m", "vlm_jax.train", "--config", f"{CONFIG}:steps={steps}", "--workdir", workdir, "--config.evaluations={}",
                "--config.log_every=1", "--config.checkpoint.every=1", "--config.stages.0.schedule.warmup=1",
                f"--config.stages.0.data.pairs.batch_size={batch_size}"]
    subprocess.run(command(2), cwd=FOLDER.parents[1], check=True, stdout=subprocess.DEVNULL)
    began = time.perf_counter()
    with subprocess.Popen(command(3), cwd=FOLDER.parents[1], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("step 3/"):
                seconds = time.perf_counter() - began
        if child.wait():
            raise RuntimeError(f"the resumed run ended with {child.returncode}")
    return seconds


def main(batch_size: int = 256, sizes: tuple[int, ...] = BALLAST_MB) -> dict[str, float]:
    """Measures, prints and writes results.json; returns its metrics."""
    from experiments.results import write_results
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run([sys.executable, "-m", "experiments.bench_checkpoint.run", "--child", json.dumps([size, batch_size, folder])],
                                   cwd=FOLDER.parents[1], capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(child.stderr[-3000:])
        rows.append(json.loads(child.stdout.splitlines()[-1]))
        print("  ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        seconds = resume(batch_size, os.path.join(folder, "run"))
    print(f"resume to first step: {seconds:.1f} s")
    metrics = {"stall_seconds_minus_allowance": max(row["stall_seconds_minus_allowance"] for row in rows),
               "median_stall_seconds_minus_allowance": max(row["stall_seconds"] - row["allowance_seconds"] for row in rows), "resume_seconds": seconds,
               **{f"stall_seconds_{math.floor(row['megabytes'])}_mb": row["worst_stall_seconds"] for row in rows}}
    write_results(FOLDER, metrics, config=CONFIG, batch_size=batch_size, saves=SAVES, load_average=os.getloadavg()[0], rows=rows)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(stall(*json.loads(options.child))))
    else:
        main(options.batch_size)
