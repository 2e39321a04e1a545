"""The code and the commands of docs/few_shot.md work as they are written."""
import json
from pathlib import Path
import re

import jax
import numpy as np
from PIL import Image
import pytest

import vlm_jax
from vlm_jax import registry
from vlm_jax.data.processor import Processor
from vlm_jax.training.loop import train

PAGE = (Path(__file__).parents[2] / "docs" / "few_shot.md").read_text(encoding="utf-8")
BLOCKS = [(tag.strip(), code) for tag, code in re.findall(r"^```python([^\n]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
COMMANDS = [line.split() for line in re.findall(r"^    python -m (.+)$", PAGE, re.MULTILINE)]
WORDS = dict(name="shapes_texts", split="train", kinds=["description", "episode"], count=300)


def processor(marks, **form):
    text = [["lowercase", {}], ["tokenize", dict(tokenizer=dict(train_on=WORDS, vocab_size=384, model_type="bpe", added=marks))]]
    image = [["decode", {}], ["resize", dict(size=24, method="bicubic")], ["value_range", dict(low=0.0, high=1.0)]]
    return dict(image=image, text=text, format=dict(kind="interleaved", length=48, pictures=2, begin="<s>", **form))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, tables and a run, whose model has taken one step."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "photos").mkdir()
    for number in range(1, 5):
        Image.fromarray(np.full((30, 40, 3), 60 * number, np.uint8)).save(folder / "photos" / f"{number}.png")
    for name, numbers in (("asked", (3, 4)), ("shown", (1, 2))):
        lines = [json.dumps({"image": f"{number}.png", "prompt": "what is it?", "texts": ["plim"]}) for number in numbers]
        (folder / "photos" / f"{name}.jsonl").write_text("\n".join(lines))
    settings = processor(["<s>", "<image>", "<|endofchunk|>"], chunk_end="<|endofchunk|>")
    vocabulary = Processor(**settings).vocab_size
    config = dict(
        name="page", seed=0, processor=settings, task=dict(name="generation"),
        model=dict(name="flamingo", preset="test", language=dict(vocab_size=vocabulary, depth=2, new_tokens=0), resampler=dict(depth=1), scan=False),
        stages=[dict(steps=1, data=dict(episodes=dict(source=dict(name="shapes_episodes", shots=1, size=24, kinds=["binding"]), batch_size=2)),
                     optimizer=dict(name="sgd"), schedule=dict(name="constant", peak=1e-3))])
    train(config, folder / "runs" / "flamingo_shapes", devices=jax.devices()[:1])
    return folder


def executed(code, names):
    exec(compile(code, "docs/few_shot.md", "exec"), names)  # noqa: S102  (our own page)
    return names


def test_blocks_run_in_order(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    for tag, code in BLOCKS:
        if not tag:
            executed(code, names)
    assert names["scores"].shape == (2, 2) and np.isfinite(names["scores"]).all() and names["batch"]["images"].shape == (2, 3, 24, 24, 3)


def test_the_evaluations_of_the_page(place, monkeypatch):
    from vlm_jax import evaluate
    from vlm_jax.training.config import load_config, resolve
    monkeypatch.chdir(place)
    (code,) = (code for tag, code in BLOCKS if tag == "config")
    (place / "my_few_shot.py").write_text(code.replace("count=200", "count=2").replace("shots=[0, 4]", "shots=[2]"))
    (words,) = (words for words in COMMANDS if words[0] == "vlm_jax.evaluate")
    results = evaluate.run(words[1:])
    assert set(results) == {"binding", "mine"} and results["binding"]["queries"] == 2 and "accuracy/2_shots" in results["mine"]
    assert (place / "runs/flamingo_shapes/evaluations/mine/1/predictions.jsonl").exists()
    # The others, as far as settings go: what they compute is tested in test_few_shot.py.
    from vlm_jax.evaluation.few_shot import check_settings
    for settings in resolve(load_config("my_few_shot.py"))["evaluations"].values():
        check_settings(**{name: value for name, value in settings.items() if name not in ("evaluator", "source")})


def test_idefics(place, monkeypatch):
    from vlm_jax import convert
    monkeypatch.chdir(place)
    around = "<fake_token_around_image>"
    made = Processor(**processor(["<s>", around, "<image>"], chunk_end=False, image_text=f"{around}<image>{around}"))
    settings = registry.settings("idefics", "test", language=dict(vocab_size=made.vocab_size - 2, depth=4, new_tokens=2))
    model = registry.build("idefics", **settings)
    inputs = {name: np.zeros((1, *shape), np.float32 if name == "images" else np.int32) for name, shape in model.input_shapes().items()}
    params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    vlm_jax.save(vlm_jax.Loaded(model, params, made, dict(model=dict(name="idefics", **settings)), step=0), "idefics-9b")
    (code,) = (code for tag, code in BLOCKS if tag == "weights")
    names = executed(code, {"vlm_jax": vlm_jax})
    assert len(names["texts"]) == 1
    again = vlm_jax.load("idefics-again")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), dict(again.params), dict(params))))
    (words,) = (words for words in COMMANDS if words[0] == "vlm_jax.convert")
    assert convert.run(words[1:]) == "idefics-bfloat16" and (place / "idefics-bfloat16" / "config.json").exists()


def test_open_flamingo(place, monkeypatch):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file

    from vlm_jax.interop import open_flamingo
    from vlm_jax.interop.directory import Imported
    monkeypatch.chdir(place)
    torch.save({"model_state_dict": {"perceiver.latents": torch.ones(2, 3).T}}, "checkpoint.pt")
    executed(next(code for tag, code in BLOCKS if tag == "torch"), {})
    assert load_file("checkpoint.safetensors")["perceiver.latents"].shape == (3, 2)
    asked = []   # what loading does is tested in interop/families/test_open_flamingo.py
    monkeypatch.setattr(open_flamingo, "load_open_flamingo", lambda *given: asked.append(given[:3]) or Imported(None, {}, None, {}, {}))
    executed(next(code for tag, code in BLOCKS if tag == "open_flamingo"), {"vlm_jax": vlm_jax})
    assert asked == [("checkpoint.safetensors", "mpt-7b", "clip-vit-large-patch14")]
