"""The one training loop. Read `train` from top to bottom; it knows no model: a task hands it pure functions (docs/architecture.md)."""
from collections.abc import Mapping
import json
import os
import time
from typing import Any

import jax
import numpy as np

from vlm_jax.errors import CheckpointError, ConfigError, DivergedError
from vlm_jax.sharding.mesh import put_batch
from vlm_jax.training import flops, setup
from vlm_jax.training.checkpoints import Checkpoints, DamagedCheckpoint
from vlm_jax.training.config import load_saved, resolve, save_config
from vlm_jax.training.environment import use_compile_cache, write_environment
from vlm_jax.training.evaluators import due, evaluate_all, print_metrics
from vlm_jax.training.locks import WorkdirLock
from vlm_jax.training.metrics import MetricWriter, Progress
from vlm_jax.training.parameters import parameter_table
from vlm_jax.training.report import write_report
from vlm_jax.training.transfer import init_from


def train(config, workdir: str | os.PathLike, *, profile: str | None = None, devices=None) -> dict[str, Any]:
    """Trains `config` in `workdir`, or goes on from the newest checkpoint that verifies.

    Same config, seed and mesh: bit-identical, also across interruptions. Another mesh: the same data order, losses equal to about 1e-5.

    Args:
      config: a ConfigDict or dict as docs/architecture.md describes.
      profile: "10-13" writes a profiler trace of steps 10 to 13 into `workdir/profile`.
      devices: the devices of the mesh; default: all.
    Returns:
      {"step", "loss", "evaluations": {name: metrics}, "report": path, "machine_gflops", "seconds"}.
    Raises:
      ConfigError, DataError, CheckpointError, DivergedError: as their names say, each in one line.
    """
    config = resolve(config)
    stages = setup.read(config)
    workdir = os.fspath(workdir)
    started = time.perf_counter()
    prepare_workdir(workdir)
    with WorkdirLock(workdir), Checkpoints(os.path.join(workdir, "checkpoints"), keep=config["checkpoint"].get("keep", 2)) as checkpoints:
        check_same_run(config, workdir)
        use_compile_cache()
        step, parts, state = restore_or_begin(config, stages, checkpoints, devices)
        machine = flops.measure_matmul_peak()
        peak = machine if jax.default_backend() == "cpu" else flops.peak_flops()
        save_config(config, workdir)
        write_environment(workdir, extra={"matmul_gflops": machine / 1e9})
        writer = MetricWriter(workdir, resume_from=step)
        evaluations: dict[str, dict[str, float]] = {}
        loss = float("nan")
        while True:
            if step < parts.last:
                parts.processor.save(os.path.join(workdir, "processor.json"))
                announce(parts, config, workdir)
                with jax.set_mesh(parts.mesh):
                    state, loss, evaluations = run_stage(parts, config, workdir, step, state, checkpoints, writer, peak, stages[-1].last, profile)
                step = parts.last
            if parts.stage.index + 1 == len(stages):
                break
            parts, state = next_stage(config, stages, parts, state, devices)
        checkpoints.wait()
        if not evaluations and config["evaluations"]:   # a finished run, started once more
            with jax.set_mesh(parts.mesh):
                evaluations = run_evaluations(config["evaluations"], parts, state, workdir, step, writer)
        writer.close()
        report = write_report(workdir)
    return {"step": step, "loss": loss, "evaluations": evaluations, "report": report, "machine_gflops": machine / 1e9, "seconds": time.perf_counter() - started}


def run_stage(parts: setup.Parts, config: Mapping[str, Any], workdir: str, step: int, state, checkpoints: Checkpoints, writer: MetricWriter, peak: float | None,
              final: int, profile: str | None):
    """Takes the steps from `step` to the end of the stage; returns (state, last loss, last evaluations)."""
    log_every, save_every = config["log_every"], config["checkpoint"].get("every")
    batch_size = sum(loader.batch_size for loader in parts.loaders.values())
    batches = parts.batches(step - parts.first)
    progress = Progress(first=step, last=final, batch_size=batch_size)
    trace = Profile(profile, workdir)
    # Simulated devices share a few threads: collectives of two programs at once can wait for each other until XLA gives up and aborts.
    simulated = jax.default_backend() == "cpu" and parts.mesh.size > 1
    pending, evaluations, loss = None, {}, float("nan")
    step_flops = None
    while step < parts.last:
        with progress.waiting_for_data():
            host_batch = next(batches)
        batch = put_batch(host_batch, parts.mesh)
        if step_flops is None:
            step_flops = flops.training_flops(parts.task, state["params"], state["task"], batch, parts.rules)
            progress.compiling()
        trace.before(step)
        state, metrics = parts.step(state, batch, np.int32(step))
        step += 1
        if simulated:
            jax.block_until_ready(state)
        # The device works on this step while the host looks at the one before.
        check_finite(pending, workdir)
        pending = (step, metrics, host_batch)
        trace.after(step, metrics)

        logs, last = step % log_every == 0 or step == parts.last, step == parts.last
        saves = last or (save_every and step % save_every == 0)
        evaluates = [name for name, settings in config["evaluations"].items() if due(settings, step, final)]
        if logs or saves or evaluates:
            pending = check_finite(pending, workdir)
            loss = float(metrics["loss"])
        if logs:
            row = {name: float(value) for name, value in metrics.items() if name != "finite"}
            row.update(progress.rates(step, step_flops, peak, parts.mesh.size))
            bad = sum(sum(loader.bad.values()) for loader in parts.loaders.values())
            writer.write(step, "train", dict(row, **({"bad_records": bad} if bad else {})))
            print(progress.line(step, row), flush=True)
        if saves:
            with progress.paused():
                checkpoints.save(step, state, {"step": step, "stage": parts.stage.index, "seed": config["seed"]})
        if evaluates:
            with progress.paused():
                evaluations = run_evaluations({name: config["evaluations"][name] for name in evaluates}, parts, state, workdir, step, writer)
    for name, loader in parts.loaders.items():
        if loader.bad:
            print(f"  {name}: skipped bad records: " + ", ".join(f"{reason} {count}" for reason, count in sorted(loader.bad.items())), flush=True)
    return state, loss, evaluations


def restore_or_begin(config, stages, checkpoints: Checkpoints, devices):
    """Returns (step, parts of its stage, state): from the newest checkpoint that verifies, else the beginning."""
    steps = checkpoints.steps()
    for step in reversed(steps):
        index = next((i for i, stage in enumerate(stages) if stage.first < step <= stage.last), None)
        if index is None:
            raise CheckpointError(f"{checkpoints.folder}: the checkpoint of step {step} is beyond the {stages[-1].last} steps of this config; "
                                  "raise stages[-1].steps or choose another workdir.")
        parts = setup.build(config, index, stages, devices)
        try:
            state, _ = checkpoints.restore(parts.abstract_state, step)
        except DamagedCheckpoint as error:
            print(f"warning: {error} Going back to the checkpoint before it.", flush=True)
            continue
        print(f"resumed at step {step} of {stages[-1].last} from {checkpoints.folder}", flush=True)
        return step, parts, state
    if steps:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint verifies; move the folder away to begin anew.")
    parts = setup.build(config, 0, stages, devices)
    return 0, parts, begin(parts, None)


def next_stage(config, stages, done: setup.Parts, state, devices):
    """Returns (parts, state) of the stage after `done`, whose parameters are handed over."""
    parts = setup.build(config, done.stage.index + 1, stages, devices)
    return parts, begin(parts, jax.device_get(state.get("ema", state["params"])))


def begin(parts: setup.Parts, previous):
    """Returns a stage's first state: random, from the stage before it, or as `init_from` says."""
    source = parts.stage.init_from
    if source is None:
        return parts.initial_state(previous)
    settings = dict(source)
    from_previous = settings.pop("previous", False)
    if from_previous and previous is None:
        raise ConfigError(f"stages[{parts.stage.index}].init_from.previous: there is no stage before the first; name a workdir.")
    fresh = jax.device_get(parts.initial_state()["params"])
    return parts.initial_state(init_from(fresh, previous=previous if from_previous else None, **settings))


def run_evaluations(evaluations, parts: setup.Parts, state, workdir: str, step: int, writer: MetricWriter) -> dict[str, dict[str, float]]:
    """Evaluates the moving average where the stage keeps one, else the parameters; writes and prints the metrics."""
    from vlm_jax.evaluation.predictor import Predictor
    predictor = Predictor(parts.model, state.get("ema", state["params"]), parts.processor, mesh=parts.mesh)
    results = evaluate_all(evaluations, predictor, workdir, step)
    for name, metrics in results.items():
        writer.write(step, "eval", {"name": name, **metrics})
        print_metrics(name, step, metrics)
    return results


def check_finite(pending, workdir: str) -> None:
    """Raises a DivergedError naming the step and the batch whose loss or gradient was not finite; the state had been left unchanged by it."""
    if pending is None:
        return
    step, metrics, batch = pending
    if bool(metrics["finite"]):
        return
    ids = {name: [int(i) for i in stream["example_id"]] for name, stream in batch.items()}
    path = os.path.join(workdir, "diverged.json")
    with open(path, "w") as file:
        json.dump({"step": step, "loss": repr(float(metrics["loss"])), "example_id": ids}, file)
    raise DivergedError(f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['gradient_norm'])}; the examples of the batch are in "
                        f"{path}, the checkpoints are sound. Lower the learning rate, set clip, or look at those examples.")


def prepare_workdir(workdir: str) -> None:
    """Makes the workdir and proves that it can be written."""
    probe = os.path.join(workdir, ".writable")
    try:
        os.makedirs(workdir, exist_ok=True)
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise CheckpointError(f"{workdir}: the workdir cannot be written ({error.strerror}); choose another --workdir or mend its permissions.") from None


def check_same_run(config: Mapping[str, Any], workdir: str) -> None:
    """Raises where the workdir holds a run of another model, seed or data; lengths, evaluations and intervals may change."""
    if not os.path.exists(os.path.join(workdir, "config.json")):
        return
    old = load_saved(workdir)
    for key in ("model", "seed", "processor", "task", "dtypes"):
        if old[key] != config[key]:
            raise ConfigError(f"{workdir}: holds a run whose {key} is {json.dumps(old[key])[:200]}, this config's is {json.dumps(config[key])[:200]}; "
                              "choose another --workdir, or delete that run.")


def announce(parts: setup.Parts, config: Mapping[str, Any], workdir: str) -> None:
    """Prints what the stage trains, and writes the parameter table into the workdir."""
    table = parameter_table(parts.abstract_state["params"], parts.rules)
    with open(os.path.join(workdir, "parameters.txt"), "w") as file:
        file.write(table + "\n")
    mesh = " x ".join(f"{name}={size}" for name, size in parts.mesh.shape.items() if size > 1) or "one device"
    streams = ", ".join(f"{name}: {len(loader.source):,} records, batch {loader.batch_size}" for name, loader in parts.loaders.items())
    print(f"{config['name']}, stage {parts.stage.index + 1}, steps {parts.first + 1} to {parts.last}; {mesh}; {streams}")
    print(parts.rules.summary(), flush=True)


class Profile:
    """A profiler trace of some steps: `Profile("10-13", workdir)`; None traces nothing."""

    def __init__(self, steps: str | None, workdir: str):
        try:
            self.first, self.last = (int(part) for part in steps.split("-")) if steps else (None, None)
        except ValueError:
            raise ConfigError(f"--profile {steps}: write FROM-TO, for example 10-13.") from None
        self.folder = os.path.join(workdir, "profile")

    def before(self, step: int) -> None:
        """Starts the trace when `step`, counted from 0, is about to be taken and is the first one asked for."""
        if self.first is not None and step + 1 == self.first:
            jax.profiler.start_trace(self.folder)

    def after(self, step: int, metrics) -> None:
        """Ends the trace after the last step asked for."""
        if self.last is not None and step == self.last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            print(f"  profiler trace of steps {self.first}-{self.last}: {self.folder}", flush=True)

