"""Parameters taken from another tree: mapping, policies, resampled positions, the table of differences."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.nn.positions import resample_positions
from vlm_jax.training.transfer import init_from
from vlm_jax.training.trees import flatten


def tree(seed, grid=4, width=6):
    generator = np.random.default_rng(seed)
    return {"image": {"kernel": generator.standard_normal((3, width)).astype(np.float32),
                      "positions": {"embedding": generator.standard_normal((grid * grid, width)).astype(np.float32)}},
            "text": {"table": generator.standard_normal((5, width)).astype(np.float32)}}


def test_equal_trees_are_copied_in_our_dtypes():
    ours, theirs = tree(0), tree(1)
    ours["text"]["table"] = ours["text"]["table"].astype(jnp.bfloat16)
    result = init_from(ours, previous=theirs)
    np.testing.assert_array_equal(result["image"]["kernel"], theirs["image"]["kernel"])
    assert result["text"]["table"].dtype == jnp.bfloat16
    assert list(flatten(result)) == list(flatten(ours))


def test_mapping_takes_a_tower_and_keeps_the_rest():
    ours, theirs = tree(0), {"backbone": tree(1)["image"], "head": np.ones(3)}
    result = init_from(ours, previous=theirs, mapping=[("head", None), ("backbone/(.*)", r"image/\1")])
    np.testing.assert_array_equal(result["image"]["kernel"], theirs["backbone"]["kernel"])
    np.testing.assert_array_equal(result["text"]["table"], ours["text"]["table"])


def test_the_checkpoint_of_another_run(tmp_path):
    from vlm_jax.training.checkpoints import Checkpoints
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(7, {"params": tree(1), "ema": tree(2)}, {"step": 7})
        checkpoints.wait()
    for which, seed in ((None, 2), ("ema", 2), ("params", 1)):
        result = init_from(tree(0), workdir=tmp_path / "run", step=7, which=which)
        np.testing.assert_array_equal(result["text"]["table"], tree(seed)["text"]["table"])
    with pytest.raises(CheckpointError, match=r"run \(step 7\): 1 parameters do not fit; .*\n  \+ head float32\[2\]: not in "):
        init_from({**tree(0), "head": np.zeros(2, np.float32)}, workdir=tmp_path / "run")
    with pytest.raises(CheckpointError):
        init_from(tree(0), workdir=tmp_path / "elsewhere")


@pytest.mark.parametrize("keep_first", [0, 1])
def test_image_positions_are_resampled_between_grids(keep_first):
    ours, theirs = tree(0), tree(1)
    theirs["image"]["positions"]["embedding"] = np.random.default_rng(2).standard_normal((9 + keep_first, 6)).astype(np.float32)
    ours["image"]["positions"]["embedding"] = np.zeros((16 + keep_first, 6), np.float32)
    result = init_from(ours, previous=theirs)["image"]["positions"]["embedding"]
    np.testing.assert_allclose(result, resample_positions(theirs["image"]["positions"]["embedding"], (3, 3), (4, 4), keep_first), rtol=1e-6)
    np.testing.assert_array_equal(result[:keep_first], theirs["image"]["positions"]["embedding"][:keep_first])


def test_text_positions_are_not_a_grid():
    ours = {"text": {"positions": {"embedding": np.zeros((16, 6), np.float32)}}}
    theirs = {"text": {"positions": {"embedding": np.zeros((9, 6), np.float32)}}}
    with pytest.raises(CheckpointError, match=r"! text/positions/embedding float32\[9, 6\]: this model has float32\[16, 6\]"):
        init_from(ours, previous=theirs)


def test_the_table_of_differences():
    theirs = tree(1)
    theirs["extra"] = np.zeros(2, np.float32)
    theirs["image"]["kernel"] = np.zeros((3, 7), np.float32)
    del theirs["text"]
    with pytest.raises(CheckpointError) as caught:
        init_from(tree(0), previous=theirs)
    assert str(caught.value).splitlines() == [
        'init_from the stage before: 3 parameters do not fit; set mapping, missing="keep" or unexpected="ignore", or choose another run.',
        "  ! image/kernel float32[3, 7]: this model has float32[3, 6]",
        "  + text/table float32[5, 6]: not in the stage before",
        "  - extra float32[2]: not in this model",
    ]
    theirs["image"]["kernel"] = tree(1)["image"]["kernel"]
    result = init_from(tree(0), previous=theirs, missing="keep", unexpected="ignore")
    np.testing.assert_array_equal(result["text"]["table"], tree(0)["text"]["table"])


@pytest.mark.parametrize("settings, error, expected", [
    (dict(mapping=[("imgae/.*", "x")]), ConfigError, 'init_from.mapping[0]: "imgae/.*" matches none of their parameters'),
    (dict(mapping=[(".*", "image/kernel")]), ConfigError, "init_from.mapping: two parameters become image/kernel, the second is"),
    (dict(mapping=[("(", "x")]), ConfigError, "init_from.mapping: "),
    (dict(mapping=["image"]), ConfigError, "init_from.mapping: "),
    (dict(mapping=[("image/kernel", r"\2")]), ConfigError, 'init_from.mapping[0]: "\\2" cannot be filled in'),
    (dict(missing="skip"), ConfigError, 'init_from.missing is "skip"; choose error or keep.'),
    (dict(workdir="x"), ConfigError, "init_from needs either a workdir or the stage before"),
    (dict(mapping=[("image/(.*)", r"other/\1")], unexpected="ignore"), CheckpointError,
     "init_from the stage before: no parameter of it is in this model"),
])
def test_messages(settings, error, expected):
    with pytest.raises(error) as caught:
        init_from(tree(0), previous=tree(1), **settings)
    assert str(caught.value).startswith(expected)


def test_what_was_taken_left_and_unused_is_said(capsys):
    """A regex maps part of another run onto part of this one."""
    theirs = {"encoder": {"visual": {"kernel": np.ones((3, 6), np.float32)}, "extra": np.ones(2, np.float32)}}
    ours = tree(0)
    result = init_from(ours, previous=theirs, mapping=[(r"encoder/visual/(.*)", r"image/\1"), (r"encoder/(extra)", r"other/\1")], unexpected="ignore")
    np.testing.assert_array_equal(result["image"]["kernel"], np.ones((3, 6)))
    np.testing.assert_array_equal(result["text"]["table"], ours["text"]["table"])
    said = capsys.readouterr().out
    assert said.startswith("init_from the stage before: 1 parameters taken; ") and "left as initialised (" in said
    assert said.rstrip().endswith("1 of theirs unused (other/extra)")


def directory_of(folder, seed=0):
    """A tiny PaliGemma in the Hugging Face layout, without a tokenizer; returns its model and parameters."""
    from vlm_jax import registry
    from vlm_jax.interop.abstract import inputs_of
    from vlm_jax.restore import Loaded, save
    model = registry.build("paligemma", image=dict(image_size=14, patch_size=7, width=6, depth=2, mlp_dim=10, num_heads=2, pool="none"), scan=False,
                           language=dict(vocab_size=37, width=9, depth=3, mlp_dim=11, num_heads=3, num_kv_heads=1, head_dim=4, norm="rms_plus_one",
                                         activation="gelu_tanh", embed_scale=3.0))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs_of(model))["params"]
    generator = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
    save(Loaded(model, params, None, {"model": {"name": "paligemma"}}, 0), folder)
    return model, params


def test_weights_of_others_are_taken_as_those_of_a_run_are(tmp_path):
    folder = tmp_path / "paligemma"
    _, params = directory_of(folder)
    ours = jax.tree.map(jnp.zeros_like, params)
    ours["language"]["norm"]["scale"] = ours["language"]["norm"]["scale"].astype(jnp.bfloat16)
    taken = init_from(ours, workdir=folder)
    assert flatten(taken)["language/norm/scale"].dtype == jnp.bfloat16
    for path, leaf in flatten(taken).items():
        np.testing.assert_array_equal(leaf, np.asarray(flatten(params)[path]).astype(leaf.dtype), path)
    tower = init_from({"tower": ours["image"]}, workdir=str(folder), mapping=[("image/(.*)", r"tower/\1")])
    np.testing.assert_array_equal(tower["tower"]["norm"]["scale"], params["image"]["norm"]["scale"])


def test_a_directory_has_no_steps_and_says_what_does_not_fit(tmp_path):
    folder = tmp_path / "paligemma"
    _, params = directory_of(folder)
    for settings in (dict(step=3), dict(which="ema")):
        with pytest.raises(ConfigError, match=f"init_from.{next(iter(settings))}: .* is no run"):
            init_from(params, workdir=folder, **settings)
    params["language"]["token_embedding"] = np.zeros((38, 9), np.float32)
    with pytest.raises(CheckpointError, match=r"1 parameters do not fit; .*\n  ! language/token_embedding float32\[37, 9\]: this model has float32\[38, 9\]"):
        init_from(params, workdir=folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        init_from(params, workdir=folder)
    with pytest.raises(CheckpointError, match="absent.npz"):
        init_from(params, workdir=tmp_path / "absent.npz")


def test_a_stage_takes_a_tower_from_here_and_a_model_from_there(tmp_path):
    """A list of sources fills one part after the other; what none has stays as initialised."""
    from vlm_jax.training.stages import read_stages
    sources = [dict(workdir="a", mapping=[["(.*)", r"image/\1"]]), dict(workdir="b", mapping=[["(.*)", r"language/\1"]])]
    section = dict(steps=1, data={"pairs": {"source": {}, "batch_size": 1}}, init_from=sources)
    sections = {name: {} for name in ("model", "processor", "task", "mesh", "dtypes")}
    assert read_stages({**sections, "stages": [section]})[0].sources() == sources
    with pytest.raises(ConfigError, match=r"init_from\[1\].previous: there is no stage before the first"):
        read_stages({**sections, "stages": [dict(section, init_from=[sources[0], {"previous": True}])]})
    with pytest.raises(ConfigError, match=r"init_from\[0\].workdirs: there is no such key"):
        read_stages({**sections, "stages": [dict(section, init_from=[{"workdirs": "a"}])]})
    ours = {"image": {"kernel": np.zeros(2, np.float32)}, "language": {"kernel": np.zeros(3, np.float32)}, "gate": np.full(1, 5, np.float32)}
    for name, length in (("image", 2), ("language", 3)):
        ours = init_from(ours, previous={"kernel": np.arange(1, length + 1, dtype=np.float32)}, mapping=[("(.*)", rf"{name}/\1")])
    np.testing.assert_array_equal(ours["image"]["kernel"], [1, 2])
    np.testing.assert_array_equal(ours["language"]["kernel"], [1, 2, 3])
    assert ours["gate"][0] == 5
