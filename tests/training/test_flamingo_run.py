"""A Flamingo through the loop: pages with bad ones among them and pairs, image tower and language model that keep every bit, stored in half the bytes."""
import base64
import io
import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from vlm_jax.errors import DataError
from vlm_jax.settings import plain
from vlm_jax.training import setup
from vlm_jax.training.checkpoints import restore_parameters
from vlm_jax.training.config import load_config, resolve
from vlm_jax.training.loop import train
from vlm_jax.training.trees import flatten

WORDS = dict(name="shapes_captions", split="train", size=8)
SMALL = dict(width=16, depth=1, mlp_dim=16, num_heads=2)


def encoded(shade, broken=False):
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, shade, shade)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()[:40] if broken else stream.getvalue()).decode()


def page(*parts):
    """Strings are texts; numbers pictures of this shade, below 0 broken ones."""
    return {"segments": [{"kind": "text", "text": part} if isinstance(part, str) else {"kind": "image", "base64": encoded(abs(part), part < 0)}
                         for part in parts]}


GOOD = [page("a dog", 10, "red circle", 200, "blue square"), page(30, "green"), page("text alone")]
BAD = {"document_empty": page(" "), "images_missing": page(10, "one <image> two"), "corrupt": page(10, "one", -20, "two")}


def config_of(folder, pages, **stage_settings):
    path = folder / "pages.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in pages))
    config = plain(load_config("configs/siglip/shapes.py:variant=test"))
    stage = {key: value for key, value in config["stages"][0].items() if key != "train"}
    tokenizer = dict(train_on=dict(WORDS, count=50), vocab_size=300, added=["<image>", "<|endofchunk|>"])
    processor = dict(image=[["decode", {}], ["resize", dict(size=8)], ["value_range", dict(low=-1, high=1)]], text=[["tokenize", dict(tokenizer=tokenizer)]],
                     format=dict(kind="interleaved", length=24, pictures=2, begin=False))
    pairs = dict(processor, format=dict(processor["format"], length=16, pictures=1))
    stage.update(
        steps=2, model=None, processor=None, task=None, mesh=None, optimizer=dict(name="adamw"), schedule=dict(name="constant", peak=0.1),
        data=dict(pages=dict(source=dict(name="interleaved", path=str(path)), batch_size=len(pages), bad_budget=0.7),
                  pairs=dict(source=WORDS, batch_size=4, processor=pairs)),
        train=[["(gated|resampler)/.*", {}], ["language/new_.*", {}], [".*", None]], **stage_settings)
    config.update(
        name="flamingo", log_every=1, checkpoint=dict(every=1, keep=3), mesh=dict(data=1), processor=processor, stages=[stage], evaluations={},
        task=dict(name="generation", stream_weights=dict(pairs=0.2)), dtypes=dict(params="float32", compute="float32", softmax="float32", frozen="bfloat16"),
        model=dict(name="flamingo", preset=None, image=dict(image_size=8, patch_size=4, **SMALL), language=dict(vocab_size=310, new_tokens=2, **SMALL),
                   gated=dict(num_heads=2, head_dim=8), resampler=dict(num_latents=2, depth=1, num_heads=2, head_dim=8)))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flamingo")
    config = config_of(folder, [*GOOD, *BAD.values()])
    return config, folder / "run", train(config, folder / "run", devices=jax.devices()[:1])


def test_only_what_is_new_moves(run):
    config, workdir, summary = run
    assert np.isfinite(summary["loss"]) and summary["step"] == 2
    first, second = (flatten(restore_parameters(workdir, step)[0]) for step in (1, 2))
    moved = {path for path in first if (np.asarray(first[path]) != np.asarray(second[path])).any()}
    new = ("gated/", "resampler/", "language/new_")
    assert all(path.startswith(new) for path in moved)
    assert {"language/new_embedding", "gated/blocks/gate_cross", "gated/blocks/cross_attention/key/kernel", "resampler/latents"} <= moved
    assert str(first["language/token_embedding"].dtype) == "bfloat16" and str(first["gated/blocks/mlp/up/kernel"].dtype) == "float32"
    resolved = resolve(config)
    parts = setup.build(resolved, 0, setup.read(resolved), jax.devices()[:1], data=False)
    moments = [path for path, leaf in flatten(parts.abstract_state["optimizer"]).items() if leaf.ndim]
    assert moments and all(any(part in path for part in new) for path in moments)


def test_bad_pages_are_skipped_and_counted(run, tmp_path):
    rows = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if row["kind"] == "train"]
    assert logged[-1]["bad_records"] == 2 * len(BAD)
    # Of each stream its factor times the mean over target tokens, however many they are.
    pages, pairs = (np.log(logged[-1][f"perplexity/{name}"]) for name in ("pages", "pairs"))
    assert [logged[-1][f"loss/generation/{name}"] for name in ("pages", "pairs")] == pytest.approx([pages, 0.2 * pairs], rel=1e-5)
    assert logged[-1]["loss"] == pytest.approx(pages + 0.2 * pairs, rel=1e-5)
    config = config_of(tmp_path, [*GOOD, *BAD.values()])
    config["stages"][0]["data"]["pages"].update(on_bad="raise")
    resolved = resolve(config)
    with pytest.raises(DataError, match="pages.jsonl"):
        next(setup.build(resolved, 0, setup.read(resolved), jax.devices()[:1]).batches(0))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_every_bit(run):
    config, workdir, _ = run
    other = workdir.parent / "other"
    shutil.copytree(workdir, other)
    shutil.rmtree(other / "checkpoints" / "2")
    (other / "checkpoints" / "LAST_GOOD-2.json").unlink()
    assert train(config, other, devices=jax.devices()[:1])["step"] == 2
    for (path, a), b in zip(flatten(restore_parameters(workdir, 2)[0]).items(), flatten(restore_parameters(other, 2)[0]).values(), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


@pytest.mark.slow
def test_accumulated_and_with_adapters(run, tmp_path):
    config = config_of(tmp_path, GOOD + GOOD[:1], accumulate=dict(micro_batches=2))
    _, once = (train(config_of(tmp_path, GOOD + GOOD[:1]), tmp_path / "once", devices=jax.devices()[:1]),
               flatten(restore_parameters(tmp_path / "once", 1)[0]))
    train(config, tmp_path / "parts", devices=jax.devices()[:1])
    for path, leaf in flatten(restore_parameters(tmp_path / "parts", 1)[0]).items():
        np.testing.assert_allclose(np.asarray(leaf, np.float32), np.asarray(once[path], np.float32), rtol=1e-3, atol=2e-3, err_msg=path)
    lora = dict(targets=["gated/.*/(query|value)", "language/blocks/.*/query"], rank=2, alpha=4)
    config = config_of(tmp_path, GOOD, lora=lora)
    config["stages"][0]["train"] = [[".*/lora/.*", {}], [".*", None]]
    train(config, tmp_path / "lora", devices=jax.devices()[:1])
    first, second = (flatten(restore_parameters(tmp_path / "lora", step)[0]) for step in (1, 2))
    moved = {path for path in first if (np.asarray(first[path]) != np.asarray(second[path])).any()}
    assert moved and all("/lora/" in path for path in moved) and any(path.startswith("language/") for path in moved)
