"""Config files, arguments, overrides, resolving and config.json; the messages of the first hour word for word."""
import json

from hypothesis import given, strategies as st
import ml_collections as ml
import pytest

from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.settings import plain
from vlm_jax.training import config as configs
from vlm_jax.training.config_values import parse_text


def small():
    """The smallest config that resolves."""
    config = ml.ConfigDict()
    config.name = "small"
    config.model = dict(name="siglip", preset="test")
    config.processor = dict(image=[["decode", {}]], text=[["tokenize", {"length": 8}]])
    config.task = dict(name="contrastive", loss="sigmoid")
    config.stages = [dict(
        steps=20, data=dict(pairs=dict(source=dict(name="shapes"), batch_size=8)), train=[(r"image/.*", None), (r".*", {})],
        optimizer=dict(name="adamw", b2=0.95), schedule=dict(name="cosine", peak=1e-3, warmup=2))]
    return config


def message(error, function, *args):
    with pytest.raises(error) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parse_arg_takes_types_from_the_defaults():
    text = "steps=12,rate=1,flag,name=a=b,shards=x-{0,1}.tar,size=None"
    arg = configs.parse_arg(text, steps=3, rate=0.5, flag=False, name="", shards="", size=None)
    assert (arg.steps, arg.rate, arg.flag, arg.name, arg.shards, arg.size) == (12, 1.0, True, "a=b", "x-{0,1}.tar", None)
    assert isinstance(arg.rate, float)
    assert configs.parse_arg(None, steps=3).steps == configs.parse_arg("", steps=3).steps == 3
    assert configs.parse_arg("size=[1,2]", size=None).size == [1, 2]
    assert configs.parse_arg("flag=false", flag=True).flag is False
    assert configs.parse_arg("steps=1e6", steps=3).steps == 1_000_000


@pytest.mark.parametrize("text, expected", [
    ("stesp=3", 'config argument "stesp" is unknown. Did you mean "steps"?'),
    ("steps=3.5", "config argument steps=3.5 is a number, it must be an integer like 3."),
    ("steps=many", "config argument steps=many is text, it must be an integer like 3."),
    ("steps", 'config argument "steps" has no value; write steps=VALUE.'),
    ("variant=tset", 'config argument variant="tset" is unknown. Did you mean "test"?'),
])
def test_parse_arg_refuses(text, expected):
    assert message(ConfigError, lambda: configs.parse_arg(text, steps=3, variant="full")) == expected


def test_load_config_runs_the_file_with_its_argument(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import ml_collections as ml\ndef get_config(arg=None):\n    return ml.ConfigDict({'arg': arg})\n")
    assert configs.load_config(f"{file}:a=1,path=gs://x:y").arg == "a=1,path=gs://x:y"
    assert configs.load_config(str(file)).arg is None


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "configs/siglip/shapes.py" in configs.shipped_configs()
    for path in ("configs/siglip/shapes.py", "siglip/shapes.py"):
        assert configs.load_config(path + ":variant=test").stages[0]["steps"] == 2


def test_load_config_messages(tmp_path):
    assert message(ConfigError, configs.load_config, "configs/siglip/shaeps.py:variant=test") == (
        '--config configs/siglip/shaeps.py: there is no such file. Did you mean "configs/siglip/shapes.py"?')
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:\n")
    assert message(ConfigError, configs.load_config, str(broken)).startswith(f"{broken}:1: not valid Python")
    broken.write_text("x = 1\n")
    assert "defines no get_config" in message(ConfigError, configs.load_config, str(broken))
    broken.write_text("def get_config(arg):\n    return 3\n")
    assert "get_config returned int" in message(ConfigError, configs.load_config, str(broken))


def test_overrides_reach_into_lists_and_optional_sections():
    config = small()
    changed = configs.apply_overrides(config, ["config.seed=7", "stages.0.steps=10", "--config.stages.-1.schedule.peak=1", "model.preset=b16-224",
                                               "mesh.fsdp=2", "stages.0.clip=None", "stages.0.accumulate.micro_batches=4",
                                               "stages.0.train.0.0=text/.*",
                                               "model.text.length=28", "stages.0.optimizer.weight_decay=0.1", "processor.text.0.1.length=16"])
    stage = changed.stages[0]
    assert (changed.seed, stage["steps"], stage["schedule"]["peak"], changed.model.preset, changed.mesh.fsdp) == (7, 10, 1.0, "b16-224", 2)
    assert isinstance(stage["schedule"]["peak"], float)
    assert stage["clip"] is None and stage["accumulate"] == {"micro_batches": 4} and stage["train"][0] == ["text/.*", None]
    assert changed.model.text.length == 28 and changed.processor.text[0][1]["length"] == 16
    assert stage["optimizer"]["weight_decay"] == 0.1
    assert config.stages[0]["steps"] == 20 and "seed" not in config   # the original is left alone
    assert plain(configs.apply_overrides(plain(config), [])) == plain(configs.apply_overrides(config, []))


@pytest.mark.parametrize("override, expected", [
    ("sede=1", 'config.sede: there is no such key. Did you mean "seed"?'),
    ("stages.0.stepz=1", 'config.stages.0.stepz: there is no such key. Did you mean "steps"?'),
    ("stages.0.schedule.peek=1", 'config.stages.0.schedule.peek: there is no such key. Did you mean "peak"?'),
    ("stages.0.optimizer.weight_deacy=1", 'config.stages.0.optimizer.weight_deacy: there is no such key. Did you mean "weight_decay"?'),
    ("mesh.fspd=2", 'config.mesh.fspd: there is no such key. Did you mean "fsdp"?'),
    ("checkpoint.evry=2", 'config.checkpoint.evry: there is no such key. Did you mean "every"?'),
    ("stages.1.steps=1", "config.stages.1: the list has 1 entries; indices go from 0 to 0."),
    ("stages.first.steps=1", 'config.stages.first: this is a list of 1; give an index, 0 to 0, instead of "first".'),
    ("stages.0.steps=3.5", "config.stages.0.steps=3.5 is a number, it must be an integer like 20."),
    ("log_every=True", "config.log_every=True is true or false, it must be an integer like 10."),
    ("mesh=8", "config.mesh=8 is an integer, it must be a mapping like {'data': -1, 'fsdp': 1, 'tensor': 1}."),
    ("seed.a=1", "config.seed.a: config.seed is 0 and has no keys; set it as a whole, for example seed={'a': 1}."),
    ("seed", 'override "seed" has no value; write KEY=VALUE, for example seed=1.'),
])
def test_override_messages(override, expected):
    assert message(ConfigError, configs.apply_overrides, small(), [override]) == expected


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-10**9, 10**9), st.floats(allow_nan=False, allow_infinity=False)),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6))
def test_a_literal_is_read_back_as_it_was_written(value):
    assert parse_text(repr(value), value, "x") == parse_text(repr(value), None, "x") == value


def test_an_expression_in_an_override_is_not_evaluated(tmp_path):
    canary = tmp_path / "canary"
    text = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    assert configs.apply_overrides(small(), [f"sharding={text}"]).sharding == text
    assert not canary.exists()


def test_merge_is_deep_and_replaces_what_changes_its_name():
    base = {"model": {"name": "siglip", "preset": "test", "text": {"length": 8, "depth": 2}}, "rules": [1, 2]}
    assert configs.merge(base, {"model": {"text": {"length": 16}}, "rules": [3]}) == {
        "model": {"name": "siglip", "preset": "test", "text": {"length": 16, "depth": 2}}, "rules": [3]}
    assert configs.merge(base["model"], {"name": "clip", "preset": "emoji"}) == {"name": "clip", "preset": "emoji"}
    assert configs.merge(base, None) == base and configs.merge(base, {"rules": None})["rules"] is None


def test_resolve_fills_in_defaults_and_is_idempotent():
    resolved = configs.resolve(small())
    assert resolved["schema_version"] == 1 and resolved["mesh"]["data"] == -1 and resolved["dtypes"]["compute"] == "float32"
    stage = resolved["stages"][0]
    assert stage["clip"] == 1.0 and stage["train"] == [["image/.*", None], [".*", {}]] and stage["init_from"] is None
    assert "sections" not in stage
    assert json.loads(json.dumps(resolved)) == resolved == configs.resolve(resolved) == configs.resolve(ml.ConfigDict(resolved))


@pytest.mark.parametrize("change, expected", [
    (lambda c: c.update(evalutions={}), 'config.evalutions: there is no such key. Did you mean "evaluations"?'),
    (lambda c: c.__delitem__("task"), "config.task is missing; add it to the config."),
    (lambda c: c.update(mesh={"dat": 2}), 'config.mesh.dat: there is no such key. Did you mean "data"?'),
    (lambda c: c.update(seed=1.5), "config.seed is 1.5; it must be an integer of at least 0."),
    (lambda c: c.update(stages=[]), "config.stages must be a list with at least one stage; see docs/architecture.md."),
    (lambda c: c.stages[0].update(stesp=1), 'stages[0].stesp: there is no such key. Did you mean "steps"?'),
    (lambda c: c.stages[0].pop("steps"), "stages[0].steps is missing: Stage needs it; add it to the config."),
    (lambda c: c.stages[0].update(steps=0), "stages[0].steps is 0; it must be an integer of at least 1."),
    (lambda c: c.stages[0].update(index=0), 'stages[0].index: there is no such key.'),
    (lambda c: c.stages[0]["optimizer"].update(beta2=0.9), "stages[0].optimizer.beta2: adamw takes no such setting."),
    (lambda c: c.stages[0]["optimizer"].update(name="adamww"), 'stages[0].optimizer.name: "adamww" is unknown. Did you mean "adamw"?'),
    (lambda c: c.stages[0]["schedule"].update(warmup=21),
     "stages[0].schedule: warmup=21 do not fit into steps=20; shorten the warm-up or train longer."),
    (lambda c: c.stages[0].update(train=[("image/.*", None)]), 'stages[0].train: the last rule is "image/.*"; end with'),
    (lambda c: c.stages[0].update(ema={"decya": 0.9}), 'stages[0].ema.decya: there is no such key. Did you mean "decay"?'),
    (lambda c: c.stages[0].update(init_from={"previous": True}), "stages[0].init_from.previous: there is no stage before the first; name a workdir."),
    (lambda c: c.update(dtypes={"compute": "bfloat"}), 'config.dtypes.compute: "bfloat" is unknown. Did you mean "bfloat16"?'),
    (lambda c: c.update(checkpoint={"keep": 0}), "config.checkpoint.keep is 0; it must be an integer of at least 1."),
    (lambda c: c.update(evaluations={"search": {"every": 3}}), "config.evaluations.search.evaluator is missing; name one"),
    (lambda c: c.update(evaluations={"search": {"evaluator": "retrieval", "every": 0}}), "config.evaluations.search.every is 0; it must be"),
    (lambda c: c.task.update(scale=ml), "config.task.scale is a module; a config holds"),
])
def test_resolve_messages(change, expected):
    config = small()
    change(config)
    assert message(ConfigError, configs.resolve, config).startswith(expected)


def test_stages_see_the_global_sections_with_their_own_laid_over():
    from vlm_jax.training.stages import read_stages, stage_sections
    config = small()
    second = dict(config.stages[0], steps=5, model=dict(image=dict(size=48)), mesh=dict(fsdp=2), task=dict(loss="softmax"))
    config.stages = [dict(config.stages[0]), second]
    resolved = configs.resolve(config)
    first, second = read_stages(resolved)
    assert (first.first, first.last, second.first, second.last, second.index) == (0, 20, 20, 25, 1)
    assert first.sections["model"] == {"name": "siglip", "preset": "test"}
    assert second.sections["model"] == {"name": "siglip", "preset": "test", "image": {"size": 48}}
    assert second.sections["mesh"]["fsdp"] == 2 and second.sections["task"]["loss"] == "softmax"
    assert second.sections["processor"] == resolved["processor"]
    assert stage_sections(resolved, -1) == second.sections


def test_config_json_is_read_back_and_a_python_file_beside_it_is_not(tmp_path):
    saved = configs.save_config(small(), tmp_path / "run")
    (tmp_path / "run" / "config.py").write_text("raise SystemExit('the planted file ran')\n")
    assert configs.load_saved(tmp_path / "run") == saved == configs.resolve(saved)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "config.py"]


def test_config_json_messages(tmp_path):
    assert message(CheckpointError, configs.load_saved, tmp_path) == f"{tmp_path}: no config.json here; name the --workdir of a training run."
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in message(CheckpointError, configs.load_saved, tmp_path)
    (tmp_path / "config.json").write_text('{"schema_version": 99}')
    assert "schema_version is 99, this version of vlm_jax reads 1" in message(CheckpointError, configs.load_saved, tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot write config.json" in message(CheckpointError, configs.save_config, small(), tmp_path / "file")


@pytest.mark.parametrize("path", configs.shipped_configs())
@pytest.mark.parametrize("variant", ["full", "test"])
def test_every_shipped_config_resolves(path, variant):
    config = configs.resolve(configs.load_config(f"{path}:variant={variant}"))
    assert configs.resolve(config) == config
