"""What a stage's compiled step holds in memory: donated state, frozen towers that run once, frozen matrices in bfloat16."""
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.settings import plain
from vlm_jax.training import setup
from vlm_jax.training.checkpoints import Checkpoints
from vlm_jax.training.config import load_config, merge, resolve
from vlm_jax.training.dry_run import abstract_batch, state_bytes
from vlm_jax.training.flops import count_flops
from vlm_jax.training.loop import begin
from vlm_jax.training.trees import flatten

LOCKED, ALL = [["image/.*", None], [".*", {}]], [[".*", {}]]


def parts_of(train=LOCKED, index=0, later=(), mesh=None, **overrides):
    """A stage of the test variant of LiT, without data; `later`: the rules of the stages after it."""
    config = plain(load_config("configs/lit/coco_captions.py:variant=test"))
    stage = {**config["stages"][0], "train": train, **overrides.pop("stage", {})}
    config.update(stages=[stage, *({**stage, "train": rules} for rules in later)], evaluations={}, mesh=mesh or dict(data=1))
    config = resolve(merge(config, overrides))
    devices = jax.devices()[:int(np.prod(list(config["mesh"].values())))]
    return setup.build(config, index, setup.read(config), devices, data=False)


def lower(parts):
    with jax.set_mesh(parts.mesh):
        return parts.step.lower(parts.abstract_state, abstract_batch(parts), jax.ShapeDtypeStruct((), np.int32))


def batch_of(parts, seed=0):
    """A random batch on the mesh."""
    generator = np.random.default_rng(seed)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            value = generator.standard_normal(leaf.shape) if len(leaf.shape) > 1 else np.ones(leaf.shape)
        else:
            value = generator.integers(1, 200, leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)
    return jax.tree.map(fill, abstract_batch(parts))


def steps(parts, state, count=3, step=None):
    step, losses = step or parts.step, []
    with jax.set_mesh(parts.mesh):
        for number in range(count):
            state, metrics = step(state, batch_of(parts, number), np.int32(number))
            losses.append(float(metrics["loss"]))
    return state, losses


def image(state):
    return {path: np.asarray(leaf) for path, leaf in flatten(state["params"]).items() if path.startswith("image/")}


def assert_updated_in_place(parts, compiled):
    """Every array of the state, and all of its bytes, are aliased to the step's inputs."""
    assert compiled.memory_analysis().alias_size_in_bytes == state_bytes(parts.abstract_state)
    entry = compiled.as_text().splitlines()[0]
    aliases = entry[entry.index("input_output_alias={"):].split("entry_computation_layout")[0]
    assert aliases.count("-alias)") == len(jax.tree.leaves(parts.abstract_state))


def test_the_compiled_step_updates_the_whole_state_in_place():
    low = dict(name="adamw", momentum_dtype="bfloat16", second_moment_dtype="bfloat16")
    parts = parts_of(ALL, mesh=dict(data=2, fsdp=4), stage=dict(ema=dict(decay=0.9), optimizer=low))
    assert_updated_in_place(parts, lower(parts).compile())


def test_a_frozen_tower_runs_once_and_keeps_no_activation():
    """No product of the locked tower is taken twice, with or without rematerialisation, and none is stacked over layers for a backward pass."""
    def step_of(train, remat):
        parts = parts_of(train, model=dict(remat=remat))
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (parts.abstract_state, abstract_batch(parts)))
        return parts, count_flops(parts.step.__wrapped__, *abstract, jax.ShapeDtypeStruct((), np.int32))
    (locked, work), (_, more) = step_of(LOCKED, "full"), step_of(ALL, "full")
    # Of 8 pictures: patches, and two blocks of four projections, attention over 10 tokens and the MLP; the backward pass and the second forward pass are gone.
    tower = 8 * 2 * (9 * 64 * 192 + 2 * (4 * 10 * 64 * 64 + 2 * 10 * 10 * 64 + 2 * 10 * 64 * 256))
    assert work < more - 2.5 * tower
    hidden = "f32[2,8,10,256]"     # of the MLPs of all layers of the image tower; the text tower has 16 tokens
    program, other = lower(locked).compile(), lower(parts_of(ALL)).compile()
    assert hidden not in program.as_text() and hidden in other.as_text()
    assert program.memory_analysis().temp_size_in_bytes < other.memory_analysis().temp_size_in_bytes


def test_bfloat16_storage_changes_no_bit_of_bfloat16_compute_and_no_frozen_bit():
    options = dict(stage=dict(optimizer=dict(name="adafactor"), accumulate=dict(micro_batches=2, cached=True)))
    exact, low = (parts_of(dtypes=dict(compute="bfloat16", **frozen), **options) for frozen in ({}, dict(frozen="bfloat16")))
    compiled = lower(low).compile()
    assert_updated_in_place(low, compiled)
    start = low.initial_state()
    before = image(start)
    matrices = {path for path, leaf in before.items() if leaf.dtype == jnp.bfloat16}
    assert "image/blocks/mlp/up/kernel" in matrices and "image/norm/scale" not in matrices and "image/blocks/norm_mlp/scale" not in matrices
    assert all(leaf.dtype == np.float32 for path, leaf in flatten(start["params"]).items() if not path.startswith("image/"))
    assert not any("image" in path for path in flatten(start["optimizer"]))
    assert state_bytes(low.abstract_state) < state_bytes(exact.abstract_state)
    (after, losses), (_, expected) = steps(low, start, step=compiled), steps(exact, exact.initial_state())
    assert losses == expected
    for path, value in image(after).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)


def test_what_a_later_stage_trains_is_never_rounded(tmp_path):
    """Stage 1 locks the tower; stage 2 trains its blocks: those stay float32 throughout, what is never trained is bfloat16, and a checkpoint keeps both."""
    later = [[["image/blocks/.*", {}], ["image/.*", None], [".*", {}]]]
    first, second = (parts_of(later=later, index=index, dtypes=dict(frozen="bfloat16")) for index in (0, 1))
    state = first.initial_state()
    assert {path for path, leaf in image(state).items() if leaf.dtype == jnp.bfloat16} >= {"image/patch_embedding/kernel", "image/position_embedding"}
    for path, leaf in image(state).items():
        assert leaf.dtype == np.float32 or not path.startswith("image/blocks/")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(first.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    handed = begin(second, jax.device_get(restored["params"]))
    for path, leaf in image(handed).items():
        np.testing.assert_array_equal(leaf, image(state)[path])
    moved, _ = steps(second, handed, 1)
    assert not np.array_equal(image(moved)["image/blocks/mlp/up/kernel"], image(state)["image/blocks/mlp/up/kernel"])
