"""The one training loop. Read `train` from top to bottom; it knows no model: a task hands it pure functions (docs/architecture.md)."""
from collections.abc import Mapping, Sequence
import dataclasses
import os
import time
from typing import Any

import jax
import numpy as np

from vlm_jax import distributed, evaluation, faults, storage
from vlm_jax.errors import CheckpointError, ConfigError, DivergedError
from vlm_jax.sharding.mesh import put_batch, to_host
from vlm_jax.training import adapters, flops, run_identity, setup
from vlm_jax.training.checkpoints import Checkpoints, DamagedCheckpoint
from vlm_jax.training.config import resolve, save_config
from vlm_jax.training.environment import use_compile_cache, write_environment
from vlm_jax.training.evaluators import due, evaluate_all, owed, print_metrics
from vlm_jax.training.guard import Evidence
from vlm_jax.training.locks import WorkdirLock
from vlm_jax.training.log_file import LogFile
from vlm_jax.training.metrics import Goodput, MetricWriter, Progress
from vlm_jax.training.parameters import parameter_table
from vlm_jax.training.preemption import Abandoned, Preemption
from vlm_jax.training.profile import Profile
from vlm_jax.training.report import write_report
from vlm_jax.training.saving import Saver
from vlm_jax.training.silent_corruption import taken_twice
from vlm_jax.training.transfer import init_from
from vlm_jax.training.watchdog import COMPILE_SECONDS, START_SECONDS, Watchdog


@dataclasses.dataclass(frozen=True)
class Run:
    """What lasts from the first step of a start to its last.

    Attributes:
      final: the step at which the run ends.
      peak: FLOP/s of one accelerator, or of the whole machine where the devices are its CPU cores; None if unknown.
    """
    config: Mapping[str, Any]
    workdir: str
    final: int
    saver: Saver
    writer: MetricWriter
    goodput: Goodput
    preemption: Preemption
    watchdog: Watchdog
    profile: Profile
    peak: float | None
    predictors: dict[int, Any] = dataclasses.field(default_factory=dict)


def train(config, workdir: str | os.PathLike, *, profile: str | None = None, devices=None) -> dict[str, Any]:
    """Trains `config` in `workdir`, or goes on from the newest checkpoint that verifies.

    Same config, seed and mesh: bit-identical, also across interruptions. Another mesh: the same data order, losses equal to about 1e-5.

    Args:
      config: a ConfigDict or dict as docs/architecture.md describes.
      profile: "10-13" writes a profiler trace of steps 10 to 13 into `workdir/profile`.
      devices: the devices of the mesh; default: all.
    Returns:
      {"step", "loss", "evaluations": {name: metrics}, "report": path, "machine_gflops", "seconds", "goodput": seconds by kind}.
    Raises:
      ConfigError, DataError, CheckpointError, DivergedError: as their names say, each in one line.
      Preempted, KeyboardInterrupt: asked to stop, and saved (`preemption.py`).
    """
    started = time.perf_counter()
    config = resolve(config)
    stages = setup.read(config)
    workdir = os.fspath(workdir)
    policy = config["checkpoint"]
    with Preemption() as preemption, Watchdog(config["watchdog"]["seconds"], os.path.join(workdir, "hang.txt")) as watchdog:
        watchdog.beat("start-up", START_SECONDS)
        faults.point("loop.start")
        prepare_workdir(workdir)
        folder = os.path.join(workdir, "checkpoints")
        with (WorkdirLock(workdir) as lock, LogFile(workdir),
              Checkpoints(folder, policy["keep"], policy["keep_every"], policy["keep_hours"], allowed=lock.check) as checkpoints):
            run_identity.check_same_run(config, workdir)
            use_compile_cache()
            watchdog.beat("building and restoring", START_SECONDS)
            step, parts, state = restore_or_begin(config, stages, checkpoints, devices)
            faults.point("loop.restored")
            if step < stages[-1].last:
                evaluation.check(config["evaluations"])
            machine = flops.measure_matmul_peak()
            save_config(config, workdir)
            write_environment(workdir, extra={"matmul_gflops": machine / 1e9})
            writer = MetricWriter(workdir, resume_from=step)
            run = Run(config, workdir, stages[-1].last, Saver(checkpoints, policy["every"], policy["minutes"]), writer,
                      Goodput(writer.kept, writer.dropped, started), preemption, watchdog, Profile(profile, workdir),
                      machine if jax.default_backend() == "cpu" else flops.peak_flops())
            loss, evaluations = logged(writer.kept, step)
            names = distributed.agree(owed(config["evaluations"], step, run.final, writer.kept))     # what a kill or a SIGTERM left undone
            with jax.set_mesh(parts.mesh):
                evaluations.update(run_evaluations(run, names, parts, state, step))
            while True:
                if step < parts.last:
                    checkpoints.prepare(parts.abstract_state)
                    announce(parts, config, workdir)
                    try:
                        with jax.set_mesh(parts.mesh):
                            state, loss, evaluations = run_stage(run, parts, step, state)
                    except DivergedError:
                        finish(run)
                        raise
                    step = parts.last
                if parts.stage.index + 1 == len(stages):
                    break
                preemption.rest()       # all is saved, and the next stage may be compiling for minutes
                watchdog.beat("beginning the next stage", COMPILE_SECONDS)
                parts, state = next_stage(config, stages, parts, state, devices)
            faults.point("loop.end")
            watchdog.beat("writing the report")
            report = finish(run)
    return {"step": step, "loss": loss, "evaluations": evaluations, "report": report, "machine_gflops": machine / 1e9, "seconds": time.perf_counter() - started,
            "goodput": run.goodput.seconds()}


def run_stage(run: Run, parts: setup.Parts, step: int, state):
    """Takes the steps from `step` to the end of the stage; returns (state, last loss, last evaluations).

    Raises:
      Preempted, KeyboardInterrupt: asked to stop; the state is saved.
      DivergedError: as the guard says; CheckpointError: saves fail in a row; DataError: too many bad records.
    """
    config, watchdog, preemption = run.config, run.watchdog, run.preemption
    batch_size = sum(loader.batch_size for loader in parts.loaders.values())
    batches = parts.batches(step - parts.first)
    progress = Progress(first=step, last=run.final, batch_size=batch_size, goodput=run.goodput)
    evidence = Evidence(parts.guard, run.workdir)
    metadata = {"stage": parts.stage.index, "seed": config["seed"], "run": run_identity.describe(config, parts.stage.index, parts.processor.digest)}
    # Simulated devices share a few threads: collectives of two programs at once can wait for each other until XLA gives up and aborts.
    simulated = jax.default_backend() == "cpu" and parts.mesh.size > 1
    pending, evaluations, loss, step_flops = None, {}, float("nan"), None
    while step < parts.last:
        watchdog.beat(f"waiting for the batch of step {step + 1}")
        with progress.waiting_for_data():
            host_batch = damaged_by_fault(next(batches))
        watchdog.beat(f"step {step + 1}")
        batch = put_batch(host_batch, parts.mesh)
        run.profile.before(step)
        faults.point("loop.step")
        if step_flops is None:
            step_flops = flops.training_flops(parts.task, state["params"], state["task"], batch, parts.rules)
            progress.compiling()
            watchdog.beat("compiling the training step", COMPILE_SECONDS)
        checked = config["sdc_check_every"] and (step + 1) % config["sdc_check_every"] == 0
        state, metrics = (taken_twice(parts.step, state, batch, np.int32(step)) if checked else parts.step(state, batch, np.int32(step)))
        step += 1
        if simulated:
            jax.block_until_ready(state)
        preemption.work()
        # The device works on this step while the host looks at the one before.
        if pending:
            evidence.examine(*pending)
        pending = (step, metrics, host_batch)
        run.profile.after(step, metrics)
        run.saver.check()

        stops, last = preemption.should_stop(), step == parts.last
        logs = step % config["log_every"] == 0 or last
        saves = run.saver.due(step, logs) or last or stops
        evaluates = [name for name, settings in config["evaluations"].items() if due(settings, step, run.final) and not stops]
        if logs or saves or evaluates:
            evidence.examine(*pending)      # a bad state is never saved
            pending, loss = None, float(metrics["loss"])
        if logs:
            log_step(run, parts, progress, step, metrics, step_flops)
        if saves:
            watchdog.beat(f"saving step {step}")
            with progress.paused("save"):
                run.writer.flush()
                run.saver.save(step, state, {"step": step, **metadata})
        if evaluates:
            with progress.paused("evaluate"):
                try:
                    evaluations = run_evaluations(run, evaluates, parts, state, step)
                except Abandoned:
                    stops = True
        if last or stops:
            watchdog.beat(f"saving step {step}")
            with progress.paused("save"):
                run.saver.finish(step, state, {"step": step, **metadata})
        if stops:
            finish(run)
            raise preemption.stop(run.workdir, step)
    for name, loader in parts.loaders.items():
        if loader.bad:
            print(f"  {name}: skipped bad records: " + ", ".join(f"{reason} {count}" for reason, count in sorted(loader.bad.items())), flush=True)
        if loader.notes:
            print(f"  {name}: " + ", ".join(f"{note} {count}" for note, count in sorted(loader.notes.items())), flush=True)
    return state, loss, evaluations


def log_step(run: Run, parts: setup.Parts, progress: Progress, step: int, metrics: Mapping[str, Any], step_flops: float) -> None:
    """Writes the row of a step into the metrics and prints its line."""
    faults.point("loop.log")
    row: dict[str, Any] = {name: float(value) for name, value in metrics.items() if name not in ("finite", "spike", "in_a_row")}
    row["skipped"] = int(row["skipped"])
    row.update(progress.rates(step, step_flops, run.peak, parts.mesh.size))
    bad = sum(sum(loader.bad.values()) for loader in parts.loaders.values())
    row.update({"bad_records": bad} if bad else {}, **({"failed_saves": run.saver.failures} if run.saver.failures else {}))
    run.writer.write(step, "train", {**row, "goodput": run.goodput.seconds()})
    say(progress.line(step, row))


def run_evaluations(run: Run, names: Sequence[str], parts: setup.Parts, state, step: int) -> dict[str, dict[str, float]]:
    """Evaluates the moving average where the stage keeps one, else the parameters; writes and prints the metrics, one evaluation after the other.

    Raises:
      Abandoned: the run is asked to stop. What was not finished is done when it goes on.
    """
    from vlm_jax.evaluation.predictor import Predictor

    def on_progress() -> None:
        run.watchdog.beat("an evaluation", START_SECONDS)
        if run.preemption.should_stop():
            raise Abandoned

    # One predictor a stage: its programs are compiled once.
    predictor = run.predictors.setdefault(parts.stage.index, Predictor(parts.model, None, parts.processor, mesh=parts.mesh, on_progress=on_progress))
    predictor.params = state.get("ema", state["params"])
    results: dict[str, dict[str, float]] = {}
    for name in names:
        faults.point("loop.evaluate")
        on_progress()
        results.update(evaluate_all(run.config["evaluations"], predictor, run.workdir, step, only=[name]))
        run.writer.write(step, "eval", {"name": name, **results[name]})
        if jax.process_index() == 0:
            print_metrics(name, step, results[name])
    return results


def finish(run: Run) -> str | None:
    """Closes the metrics, writes the report, says where the time went; returns the report's path, or None where it cannot be written."""
    say(run.goodput.line())
    run.writer.close()
    try:
        return write_report(run.workdir)
    except OSError as error:
        say(f"warning: the report cannot be written ({error.strerror or error}); python -m vlm_jax.training.report {run.workdir} writes it later.")
        return None


def logged(rows: Sequence[Mapping[str, Any]], step: int) -> tuple[float, dict[str, dict[str, float]]]:
    """Returns (the last loss, {evaluation: metrics} of `step`) from the rows of earlier starts."""
    losses = [row["loss"] for row in rows if row["kind"] == "train" and row.get("loss") is not None]
    found = {row["name"]: {key: value for key, value in row.items() if key not in ("step", "kind", "name")}
             for row in rows if row["kind"] == "eval" and row["step"] == step and "name" in row}
    return losses[-1] if losses else float("nan"), found


def damaged_by_fault(batch: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Passes the fault point of a host batch: returns it as it is, or with what `VLM_JAX_FAULT` asks for in its floating-point arrays."""
    factor = {"nan": np.nan, "spike": 1000.0}.get(faults.point("loop.batch"))
    if factor is None:
        return batch
    return {name: {key: array * array.dtype.type(factor) if np.issubdtype(array.dtype, np.floating) else array for key, array in stream.items()}
            for name, stream in batch.items()}


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
            state, _ = checkpoints.restore(parts.abstract_state, step, run=run_identity.describe(config, index, parts.processor.digest))
        except DamagedCheckpoint as error:
            print(f"warning: {error} Going back to the checkpoint before it.", flush=True)
            continue
        say(f"resumed at step {step} of {stages[-1].last} from {checkpoints.folder}")
        return step, parts, state
    if steps:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint verifies; move the folder away to begin anew.")
    parts = setup.build(config, 0, stages, devices)
    return 0, parts, begin(parts, None)


def next_stage(config, stages, done: setup.Parts, state, devices):
    """Returns (parts, state) of the stage after `done`, whose parameters are handed over."""
    parts = setup.build(config, done.stage.index + 1, stages, devices)
    begun = begin(parts, to_host(state.get("ema", state["params"])))
    begun["guard"]["skipped"] = jax.device_put(jax.device_get(state["guard"]["skipped"]), parts.abstract_state["guard"]["skipped"].sharding)
    return parts, begun


def begin(parts: setup.Parts, previous):
    """Returns a stage's first state: random, from the stage before it, or as `init_from` says."""
    if parts.stage.init_from is None:
        return parts.initial_state(previous)
    params = adapters.strip(to_host(parts.initial_state()["params"]))
    for source in parts.stage.sources():
        settings = dict(source)
        from_previous = settings.pop("previous", False)
        if from_previous and previous is None:
            raise ConfigError(f"stages[{parts.stage.index}].init_from.previous: there is no stage before the first; name a workdir.")
        params = init_from(params, previous=previous if from_previous else None, **settings)
    return parts.initial_state(params)


def prepare_workdir(workdir: str) -> None:
    """Makes the workdir and proves that it can be written."""
    probe = os.path.join(workdir, ".writable")
    try:
        if not storage.is_remote(workdir):
            os.makedirs(workdir, exist_ok=True)
        storage.write(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise CheckpointError(f"{workdir}: cannot be written ({error.strerror or error}); choose another --workdir or mend its permissions.") from None


def announce(parts: setup.Parts, config: Mapping[str, Any], workdir: str) -> None:
    """Prints what the stage trains, and writes its preprocessing and parameter table into the workdir."""
    from etils import epath
    table = parameter_table(parts.abstract_state["params"], parts.rules)
    if jax.process_index() == 0:
        try:
            parts.processor.save(os.path.join(workdir, "processor.json"))
            (epath.Path(workdir) / "parameters.txt").write_text(table + "\n")
        except OSError as error:
            raise CheckpointError(f"{workdir}: cannot be written ({error.strerror or error}); free some space, or choose another --workdir.") from error
    mesh = " x ".join(f"{name}={size}" for name, size in parts.mesh.shape.items() if size > 1) or "one device"
    streams = ", ".join(f"{name}: {len(loader.source):,} records, batch {loader.batch_size}" for name, loader in parts.loaders.items())
    say(f"{config['name']}, stage {parts.stage.index + 1}, steps {parts.first + 1} to {parts.last}; {mesh}; {streams}")
    say(parts.rules.summary())


def say(text: str) -> None:
    """Prints a line, on a pod from process 0 alone."""
    if jax.process_index() == 0:
        print(text, flush=True)
