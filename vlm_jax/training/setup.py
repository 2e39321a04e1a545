"""From a resolved config to what one stage trains with: model, task, mesh, data, optimiser, the compiled step."""
from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import registry
from vlm_jax.data.loader import Loader
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import build_source
from vlm_jax.settings import call
from vlm_jax.sharding.mesh import make_mesh, process_part
from vlm_jax.sharding.rules import check_replicated, parameter_shardings, state_shardings
from vlm_jax.tasks import build_task
from vlm_jax.training import adapters
from vlm_jax.training.gradients import ema_update, value_and_gradients
from vlm_jax.training.guard import Guard, read_guard
from vlm_jax.training.optimizers import Optimizer, build_optimizer
from vlm_jax.training.stages import Rules, Stage, read_stages, store_frozen


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """One stream of a stage's data: the keyword arguments of `stages[i].data.STREAM`."""
    source: Mapping[str, Any]
    batch_size: int
    processor: Mapping[str, Any] | None = None
    workers: int = 0
    threads: int = 2
    prefetch: int = 2
    on_bad: str = "skip"
    bad_budget: float = 0.001


@dataclasses.dataclass(frozen=True)
class AbstractStream:
    """In the place of a loader where no record is going to be read: compiling for absent hardware needs neither data nor tokenizer."""
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one stage trains with.

    Attributes:
      first, last: the steps of the run that this stage takes: it ends when `step == last`.
      processor: the preprocessing of evaluation and inference; streams may have their own. None, and loaders `AbstractStream`, if built without data.
      abstract_state: shapes and dtypes of the training state with their shardings on `mesh`.
      step: jitted (state, batch, number) -> (state, metrics); the state is donated.
    """
    stage: Stage
    first: int
    last: int
    model: Any
    processor: Processor | None
    task: Any
    mesh: jax.sharding.Mesh
    rules: Rules
    optimizer: Optimizer
    loaders: Mapping[str, Loader | AbstractStream]
    guard: Guard
    seed: int
    abstract_state: Any
    step: Callable

    def batches(self, start: int) -> Iterator[dict[str, dict]]:
        """Yields {stream: batch} in numpy from batch `start` of this stage on, checked by the task where it checks batches.

        Raises:
          DataError: for data that does not fit the model, or too much that cannot be used.
        """
        check = getattr(self.task, "check_batch", lambda params, batch: None)
        streams = {name: loader.batches(start) for name, loader in self.loaders.items()}
        while True:
            batch = {name: next(stream) for name, stream in streams.items()}
            check(self.abstract_state["params"], batch)
            yield batch

    def initial_state(self, params=None) -> dict:
        """Returns the training state at the stage's first step, on the mesh; `params` replaces the random ones, and gets the stage's adapters."""
        init, key = adapters.initializer(self.task.init, self.stage.lora), jax.random.key(self.seed)

        def initialise(rng):
            dtypes = jax.tree.map(lambda leaf: leaf.dtype, self.abstract_state["params"])
            params = jax.tree.map(lambda value, dtype: value.astype(dtype), init(rng), dtypes)
            return make_state(self.task, self.optimizer, self.stage.ema, params, self.guard)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        if params is None:
            return jax.jit(initialise, out_shardings=shardings)(key)
        params = adapters.fitted(params, self.stage.lora, key)
        params = jax.tree.map(lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding), params, self.abstract_state["params"])
        return jax.jit(lambda p: make_state(self.task, self.optimizer, self.stage.ema, p, self.guard), out_shardings=shardings)(params)


def make_state(task, optimizer: Optimizer, ema: Mapping | None, params, guard: Guard) -> dict:
    """Returns {"params", "optimizer", "task", "guard"} and, where the stage keeps a moving average, "ema"."""
    state = {"params": params, "optimizer": optimizer.init(params), "task": task.initial_state(), "guard": guard.init()}
    if ema:
        state["ema"] = params
    return state


def build(config: Mapping[str, Any], index: int, stages: list[Stage], devices=None, data: bool = True) -> Parts:
    """Builds everything of stage `index` of a resolved config.

    Args:
      data: False leaves out sources, tokenizers and preprocessing, whose files need not exist then.
    Raises:
      ConfigError: naming the key, for whatever cannot work: unknown names and settings, sizes of model and data that do not fit, a mesh without devices.
    """
    stage = stages[index]
    where = f"stages[{index}]"
    sections = stage.sections
    model = registry.build(**sections["model"], dtypes=sections["dtypes"])
    processor = call(Processor, sections["processor"], "processor") if data else None
    mesh = call(make_mesh, sections["mesh"], "mesh", devices=devices)
    task = build_task(sections["task"], model, mesh=mesh)
    if data:
        task.check_fit(processor, "processor")

    loaders = {}
    for number, (name, settings) in enumerate(sorted(stage.data.items())):
        stream = call(StreamSettings, settings, f"{where}.data.{name}")
        if not data:
            loaders[name] = AbstractStream(stream.batch_size)
            continue
        own = call(Processor, stream.processor, f"{where}.data.{name}.processor") if stream.processor else processor
        task.check_fit(own, f"{where}.data.{name}.processor")
        source = build_source(stream.source)
        loaders[name] = Loader(source, own, stream.batch_size, seed=config["seed"] + 1000 * index + number, workers=stream.workers, threads=stream.threads,
                               prefetch=stream.prefetch, on_bad=stream.on_bad, bad_budget=stream.bad_budget, part=process_part(mesh))
    init = adapters.initializer(task.init, stage.lora)
    shapes = jax.eval_shape(init, jax.random.key(0))
    rules = Rules(stage.train, shapes, where=f"{where}.train")
    optimizer = build_optimizer(stage.optimizer, stage.schedule, stage.steps, rules, clip=stage.clip, where=where)

    guard = read_guard(config.get("guard"))

    def initialise(rng):
        params = store_frozen(init(rng), rules, sections["dtypes"].get("frozen"), stages[index + 1:])
        return make_state(task, optimizer, stage.ema, params, guard)
    abstract = jax.eval_shape(initialise, jax.random.key(0))
    abstract = place(abstract, mesh, config.get("sharding"))
    first = sum(earlier.steps for earlier in stages[:index])
    step = make_step(task, optimizer, stage, abstract, config["seed"], first, guard)
    return Parts(stage, first, first + stage.steps, model, processor, task, mesh, rules, optimizer, loaders, guard, config["seed"] + index, abstract, step)


def place(abstract: Mapping[str, Any], mesh: jax.sharding.Mesh, rules=None) -> dict:
    """Returns the abstract state with a sharding on every leaf; optimiser and moving average lie as the parameters they belong to.

    Raises:
      ConfigError: for rules that cannot work, or a large model of which more than 2 % would stay replicated although the mesh could split it.
    """
    of_parameters = parameter_shardings(mesh, abstract["params"], rules)
    check_replicated(abstract["params"], of_parameters)
    shardings = state_shardings(mesh, abstract, abstract["params"], of_parameters)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)


def make_step(task, optimizer: Optimizer, stage: Stage, abstract_state, seed: int, first: int, guard: Guard) -> Callable:
    """Returns the jitted training step (state, batch, number) -> (state, metrics).

    `number` counts the steps of the whole run; random keys are folded from it, so that a resumed run draws what the undisturbed one draws. A step that the
    guard rejects changes nothing but the guard's counters: parameters, optimiser, moving average and task state stay as they are, bit for bit.
    """
    gradients_of = value_and_gradients(task, stage.accumulate, f"stages[{stage.index}].accumulate", optimizer.rules)

    def train_step(state, batch, number):
        rng = jax.random.fold_in(jax.random.key(seed), number)
        (loss, task_state, metrics), gradients = gradients_of(state["params"], state["task"], batch, rng, number)
        params, optimizer_state, facts = optimizer.update(gradients, state["optimizer"], state["params"], number - first)
        new = {"params": params, "optimizer": optimizer_state, "task": task_state}
        if stage.ema:
            new["ema"] = ema_update(state["ema"], params, number - first, **stage.ema)
        take, guarded, verdict = guard.judge(state["guard"], loss, facts["gradient_norm"])
        new = {name: jax.tree.map(lambda fresh, old: jnp.where(take, fresh, old), part, state[name]) for name, part in new.items()}
        return {**new, "guard": guarded}, {"loss": loss, **verdict, **facts, **metrics}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def read(config: Mapping[str, Any]) -> list[Stage]:
    """Returns the checked stages of a resolved config."""
    return read_stages(config)
