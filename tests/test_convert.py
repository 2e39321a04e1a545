"""`python -m vlm_jax.convert` of a run: what it trained is loaded by transformers and by us from the directory."""
import json

import jax
import numpy as np
import pytest

from tests.training.test_generation_run import SOURCE, TOWER, config_of
import vlm_jax
from vlm_jax import convert
from vlm_jax.data.sources import build_source
from vlm_jax.errors import ConfigError
from vlm_jax.training.loop import train

MODEL = dict(name="paligemma", preset=None, image=dict(image_size=16, patch_size=8, **TOWER), scan=False,
             language=dict(vocab_size=310, width=12, depth=1, mlp_dim=16, num_heads=3, num_kv_heads=1, head_dim=4, norm="rms_plus_one", norm_eps=1e-6,
                           activation="gelu_tanh", embed_scale=12 ** 0.5))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A PaliGemma of two training steps, with a format that no file of transformers can say."""
    config = config_of()
    stage = {key: value for key, value in config["stages"][0].items() if key not in ("lora", "train")} | dict(steps=2, train=[[".*", {}]])
    text = config["processor"]["text"]
    config.update(model=MODEL, stages=[stage], evaluations={}, task=dict(name="generation"))
    config["processor"].update(text=[["lowercase"], *text], format=dict(kind="prefix_lm", length=40, image_tokens=4, begin=False, separator="?"))
    workdir = tmp_path_factory.mktemp("convert") / "run"
    train(config, workdir, devices=jax.devices()[:1])
    return workdir


def test_a_run_becomes_a_directory_that_transformers_and_we_load(run, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = vlm_jax.load(run)
    assert ours.step == 2
    assert convert.run(["--from", "workdir", str(run), str(tmp_path / "hf")]) == str(tmp_path / "hf")
    again = vlm_jax.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    assert again.processor.digest == ours.processor.digest
    record = build_source(SOURCE)[0]
    inputs = {key: value[None] for key, value in again.processor.prompt(record["image"], record["prompt"].upper()).items()}
    logits, _ = jax.jit(again.model.apply)({"params": again.params}, inputs)
    expected, _ = jax.jit(ours.model.apply)({"params": ours.params}, inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    theirs, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = np.where(inputs["slots"] >= 0, theirs.config.image_token_index, inputs["tokens"])
    with torch.no_grad():
        made = theirs.eval()(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(inputs["images"][:, 0].transpose(0, 3, 1, 2).copy()),
                             token_type_ids=torch.zeros(tokens.shape, dtype=torch.int64)).logits.numpy()
    assert np.abs(made - logits).max() <= 1e-4 * np.abs(made).max()
    vlm_jax.save(again, tmp_path / "twice")
    assert vlm_jax.load(tmp_path / "twice").processor.digest == ours.processor.digest


def test_dtype_step_and_arguments_that_cannot_work(run, tmp_path):
    convert.run([str(run), str(tmp_path / "small"), "--dtype", "bfloat16", "--step", "2", "--shard_gb", "1e-5"])
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(vlm_jax.load(tmp_path / "small").params)} == {"bfloat16"}
    for arguments, message in ((["--from", "hf", str(run), "out"], "this is a workdir, not what --from hf says"),
                               ([str(run), str(run)], "source and target are the same folder"), ([str(run), "out", "--shard_gb", "0"], "give a positive size")):
        with pytest.raises(ConfigError, match=message):
            convert.run(arguments)
