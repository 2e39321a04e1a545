"""Compiles a config's programs, for devices that are there or not, and brings back what the analysis reads.

All but `local` in a child process: a topology that libtpu does not know aborts the process, simulated devices have to be asked for before JAX starts, and
what the compiler complains of goes to standard error. Several programs of one topology share a child.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from vlm_jax import errors
from vlm_jax.absent_tpu import ABSENT_TPU
from vlm_jax.errors import ConfigError, VlmError, did_you_mean
from vlm_jax.sharding.topologies import Topology, parse_topology

WHAT = ("train", "evaluate", "generate")
TIMEOUT = 3600.0


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, as plain data. Bytes are those of one device.

    Attributes:
      name: "train", "evaluate/image", "evaluate/text", "generate/prompt", "generate/step".
      mesh: {axis: size}; device k of the program is the k-th of the flattened mesh.
      places: of device k [slice, coordinates ...]; empty where devices have none.
      rows: {stream: rows of the global batch}; of a decoding step {"tokens": one for each row}.
      state: {"params", "optimizer", "task", "cache", ..., "batch"}: bytes of the arguments.
      memory: what XLA says: argument, output, alias, temp, code; None if the program does not fit and was therefore not compiled.
      needed: bytes that a program which does not fit would need, from the compiler's message.
      useful_flops, executed_flops: matrix-product FLOPs of one step on all devices, without and with what is computed again.
      replicated: [share of the parameters' elements that every device holds whole, paths].
      dtype: of the matrix products.
      hlo: the optimised HLO, "" if it was not compiled.
      log: what the compiler printed.
      seconds: {"lower", "compile"} took.
    """
    name: str
    config: str
    stage: int
    topology: str
    mesh: dict[str, int]
    places: list[list[int]]
    rows: dict[str, int]
    state: dict[str, int]
    memory: dict[str, int] | None
    needed: int | None
    useful_flops: float
    executed_flops: float
    parameters: int
    replicated: tuple[float, list[str]]
    dtype: str
    jax: str
    hlo: str = dataclasses.field(repr=False)
    log: str = dataclasses.field(default="", repr=False)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return len(self.places) or _product(self.mesh)

    @property
    def examples(self) -> int:
        """Rows of all streams."""
        return sum(self.rows.values())

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: arguments, results that are not written over them, temporaries, code."""
        if self.memory is None:
            return self.needed or 0
        m = self.memory
        return m["argument"] + m["output"] - m["alias"] + m["temp"] + m["code"]


def compile_program(config: Mapping[str, Any], topology: str | Topology, what: str = "train", stage: int = 0) -> Program:
    """Compiles one program of a config; see `compile_programs`."""
    return compile_programs(config, topology, [{"what": what, "stage": stage}])[0]


def compile_programs(config: Mapping[str, Any], topology: str | Topology, jobs: Sequence[Mapping[str, Any]], timeout: float = TIMEOUT) -> list[Program]:
    """Compiles programs of a config for a topology, in one child process unless it is `local`.

    Args:
      config: as `load_config` returns it, or resolved.
      topology: a name for `parse_topology`.
      jobs: of each program {"what": "train" | "evaluate" | "generate", "stage": index, "batch": rows of all streams together instead of the config's}.
        "evaluate" gives two programs, of images and of texts; "generate" those of the prompts and of a decoding step. Of a model that generates
        text both are the latter, since its evaluations decode.
    Returns:
      the programs in order.
    Raises:
      ConfigError: for what training would refuse, an unknown `what`, a topology that does not exist or is not present.
      VlmError: if the compiler fails otherwise, with the end of its output.
    """
    from vlm_jax.training.config import resolve
    target = topology if isinstance(topology, Topology) else parse_topology(topology)
    name = target.name
    for job in jobs:
        if job.get("what", "train") not in WHAT:
            raise ConfigError(f'what="{job["what"]}": give one of {", ".join(WHAT)}.{did_you_mean(job["what"], WHAT)}')
    asked = {"config": resolve(config), "topology": name, "jobs": [dict(job) for job in jobs]}
    if name == "local":   # a second process could not have the devices that this one holds
        with _standard_error() as log:
            made = _compile_all(asked)
        return [_program(values, log.text) for values in made]
    with tempfile.TemporaryDirectory(prefix="vlm_jax_compile_") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps(asked))
        log = Path(folder) / "log.txt"
        with log.open("wb") as stream:
            try:
                command = [sys.executable, "-m", "vlm_jax.analysis.program", str(request), str(answer)]
                done = subprocess.run(command, env=child_environment(target), stdout=stream, stderr=subprocess.STDOUT, timeout=timeout, check=False)
            except subprocess.TimeoutExpired:
                raise VlmError(f"compiling for {name} took more than {timeout:.0f} s and was stopped; allow more time, or compile a smaller mesh.") from None
        text = log.read_text(errors="replace")
        if not answer.exists():
            tail = " | ".join(line.strip() for line in text.splitlines() if line.strip())[-400:]
            raise VlmError(f"compiling for {name}: the compiler's process ended with {done.returncode} and said: {tail or 'nothing'}; "
                           "check the topology's name, and that libtpu is the version that jax names.")
        found = json.loads(answer.read_text())
    if "error" in found:
        raise getattr(errors, found["error"], VlmError)(found["message"])
    return [_program(values, text) for values in found["programs"]]


def _program(values: Mapping[str, Any], log: str) -> Program:
    return Program(**{**values, "replicated": tuple(values["replicated"])}, log=log)


class _standard_error:
    """Catches what this process's C++ code writes to standard error, and passes it on at the end; `text` holds it."""

    def __enter__(self) -> "_standard_error":
        self.file, self.saved, self.text = tempfile.TemporaryFile(), os.dup(2), ""
        os.dup2(self.file.fileno(), 2)
        return self

    def __exit__(self, *_: Any) -> None:
        os.dup2(self.saved, 2)
        os.close(self.saved)
        self.file.seek(0)
        self.text = self.file.read().decode(errors="replace")
        self.file.close()
        sys.stderr.write(self.text)


# libtpu writes the compiler's warnings to files under /tmp/tpu_logs and nowhere else, unless it is told to.
_WARNINGS_TO_STDERR = {"TPU_MIN_LOG_LEVEL": "1", "TPU_STDERR_LOG_LEVEL": "1", "TF_CPP_MIN_LOG_LEVEL": "1", "TPU_LOG_DIR": "disabled"}


def child_environment(target: Topology) -> dict[str, str]:
    """The child's environment: absent TPUs are compiled for on the CPU, simulated devices have to be asked for."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])])
    if target.chip.platform in ("tpu", "cpu"):
        environment["JAX_PLATFORMS"] = "cpu"
    if target.chip.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", environment.get("XLA_FLAGS", ""))
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={target.size}".strip()
    if target.chip.platform == "tpu":
        environment.pop("XLA_FLAGS", None)   # those of a CPU are none of libtpu's
        environment = {**ABSENT_TPU, **environment, **_WARNINGS_TO_STDERR}
    return environment


def _product(mesh: Mapping[str, int]) -> int:
    product = 1
    for size in mesh.values():
        product *= size
    return product


# What follows runs in the child.

def _compile_all(request: Mapping[str, Any]) -> list[dict]:
    import jax

    from vlm_jax.training import setup
    config, topology = request["config"], parse_topology(request["topology"])
    stages = setup.read(config)
    programs = []
    for job in request["jobs"]:
        index = job.get("stage", 0)
        if not 0 <= index < len(stages):
            raise ConfigError(f"stage {index + 1}: the config has {len(stages)}; choose one of them.")
        if job.get("batch"):
            total = sum(settings["batch_size"] for settings in stages[index].data.values())
            data = {stream: {**settings, "batch_size": max(1, settings["batch_size"] * job["batch"] // total)}
                    for stream, settings in stages[index].data.items()}
            chosen = [dataclasses.replace(stage, data=data) if k == index else stage for k, stage in enumerate(stages)]
        else:
            chosen = stages
        parts = setup.build(config, index, chosen, topology.devices, data=False)
        with jax.set_mesh(parts.mesh):
            common = dict(config=config["name"], stage=index, topology=topology.name, mesh=dict(parts.mesh.shape), places=_places(parts.mesh),
                          parameters=_elements(parts.abstract_state["params"]), replicated=_replicated(parts),
                          dtype=str(stages[index].sections["dtypes"]["compute"]), jax=jax.__version__)
            make = {"train": _train, "evaluate": _evaluate, "generate": _generate}[job.get("what", "train")]
            programs += [{**common, **program} for program in make(parts, job)]
    return programs


def _train(parts: Any, job: Mapping[str, Any]) -> list[dict]:
    import jax
    import numpy as np

    from vlm_jax.training import flops
    from vlm_jax.training.dry_run import abstract_batch
    batch, number = abstract_batch(parts), jax.ShapeDtypeStruct((), np.int32)
    state = parts.abstract_state
    useful = flops.training_flops(parts.task, state["params"], state["task"], batch, parts.rules)
    executed = flops.count_flops(parts.step, state, batch, number)
    rows = {name: stream["mask"].shape[0] for name, stream in batch.items()}
    return [_compiled("train", lambda: parts.step.lower(state, batch, number), {**state, "batch": batch}, rows, useful, max(useful, executed))]


def _evaluate(parts: Any, job: Mapping[str, Any]) -> list[dict]:
    """The predictor's programs; the batch is that of the predictor (64, or a row a device) unless the job names one."""
    import jax
    import jax.numpy as jnp

    from vlm_jax.evaluation.predictor import Predictor
    from vlm_jax.sharding.mesh import batch_sharding
    from vlm_jax.training import flops
    if not hasattr(parts.model, "encode_image"):
        if hasattr(parts.model, "extend"):
            return _generate(parts, job)
        raise ConfigError(f"what=evaluate: {type(parts.model).__name__} has no encode_image and generates no text; compile what=train.")
    params = parts.abstract_state["params"]
    predictor = Predictor(parts.model, params, None, parts.mesh, **({"batch_size": job["batch"]} if job.get("batch") else {}))
    programs = []
    for which, key, dtype in (("image", "image", jnp.float32), ("text", "tokens", jnp.int32)):
        shape = (predictor.batch_size, *parts.model.input_shapes()[key])
        batch = jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(parts.mesh))
        function = predictor.function(which)
        work = flops.count_flops(function, params, batch)
        programs.append(_compiled(f"evaluate/{which}", lambda function=function, batch=batch: function.lower(params, batch), {"params": params, "batch": batch},
                                  {which: predictor.batch_size}, work, work))
    return programs


def _generate(parts: Any, job: Mapping[str, Any]) -> list[dict]:
    """Greedy decoding of the longest prompts that the config's format allows: the prompts, and one turn of the loop."""
    from vlm_jax.decoding.abstract import BATCH, decoding_programs, prompt_of_format
    from vlm_jax.training import flops
    if not hasattr(parts.model, "extend"):
        raise ConfigError(f"what=generate: {type(parts.model).__name__} generates no text; compile what=train or evaluate.")
    if not hasattr(parts.task, "batch_shapes"):
        raise ConfigError('what=generate: the config\'s task says no shapes of prompts; take task.name="generation".')
    sections = parts.stage.sections
    processor = sections["processor"] if (sections["processor"] or {}).get("format") else next(
        (settings["processor"] for settings in parts.stage.data.values() if settings.get("processor")), sections["processor"] or {})
    shapes, answer = prompt_of_format(parts.model, parts.task.batch_shapes(processor), processor["format"])
    params = parts.abstract_state["params"]
    made = decoding_programs(parts.model, params, shapes, parts.mesh, max_tokens=answer, rows=job.get("batch") or BATCH)
    cache, rest = made.state.cache, made.state.replace(cache=None)
    work = [flops.count_flops(made.prompt, params, made.inputs), flops.count_flops(made.step, params, made.state)]
    return [_compiled("generate/prompt", lambda: made.prompt.lower(params, made.inputs), {"params": params, "batch": made.inputs}, {"prompts": made.rows},
                      work[0], work[0]),
            _compiled("generate/step", lambda: made.step.lower(params, made.state), {"params": params, "cache": cache, "batch": rest}, {"tokens": made.rows},
                      work[1], work[1])]


def _compiled(name: str, lower: Any, arguments: Mapping[str, Any], rows: Mapping[str, int], useful: float, executed: float) -> dict:
    import jax
    start = time.perf_counter()
    lowered = lower()
    middle = time.perf_counter()
    result = dict(name=name, rows=dict(rows), state={key: _bytes(value) for key, value in arguments.items()}, useful_flops=useful, executed_flops=executed,
                  memory=None, needed=None, hlo="")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        result["needed"] = needed
    else:
        stats = compiled.memory_analysis()
        names = {"argument": "argument_size_in_bytes", "output": "output_size_in_bytes", "alias": "alias_size_in_bytes", "temp": "temp_size_in_bytes",
                 "code": "generated_code_size_in_bytes"}
        result["memory"] = {key: int(getattr(stats, field)) for key, field in names.items()}
        result["hlo"] = compiled.as_text()
    result["seconds"] = {"lower": middle - start, "compile": time.perf_counter() - middle}
    return result


def out_of_memory(message: str) -> int | None:
    """The bytes that a program needs, from the message with which a TPU's compiler refuses it; None if it complains of something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    match = re.search(r"Used ([\d.]+)([KMGT]?) of|temporaries \(([\d.]+)([KMGT]?)\)|[Aa]llocat\w* (\d+)()", message)
    if match is None:
        return 0
    number, unit = next((match[k], match[k + 1]) for k in (1, 3, 5) if match[k])
    return int(float(number) * {"": 1, "K": 2 ** 10, "M": 2 ** 20, "G": 2 ** 30, "T": 2 ** 40}[unit or ""])


def _bytes(tree: Any) -> int:
    import jax
    import numpy as np
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _elements(tree: Any) -> int:
    import jax
    import numpy as np
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _replicated(parts: Any) -> list:
    import jax

    from vlm_jax.sharding.rules import replicated_share
    params = parts.abstract_state["params"]
    share, paths = replicated_share(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    return [share, list(paths)]


def _places(mesh: Any) -> list[list[int]]:
    devices = list(mesh.devices.flat)
    if not all(hasattr(device, "coords") for device in devices):
        return []
    return [[int(getattr(device, "slice_index", 0) or 0), *(int(c) for c in device.coords)] for device in devices]


def _main(request: str, answer: str) -> None:
    try:
        result: dict[str, Any] = {"programs": _compile_all(json.loads(Path(request).read_text()))}
    except VlmError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    partial = Path(answer + ".partial")
    partial.write_text(json.dumps(result))
    partial.replace(answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
