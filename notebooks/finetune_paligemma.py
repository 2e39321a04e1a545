# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune PaliGemma with LoRA
#
# Load a directory in the Hugging Face layout, ask about pictures, tune low-rank adapters on pictures of your own, and write the result for PEFT and
# transformers.
#
# **To install**, in Colab or elsewhere, run this in the folder of the repository (upload or clone it first):
#
#     %pip install -q ".[notebooks,hf]"
#
# The environment variable `VLM_JAX_WEIGHTS` names a directory of weights, for example a download of `google/paligemma-3b-pt-224`. Without it a very small
# model with random weights is written below and takes its place. It knows nothing, and learns the pictures that it is shown by heart: that shows how
# everything fits together, and no more.

# %%
import dataclasses
import os
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

import vlm_jax
from vlm_jax import registry
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import build_source
from vlm_jax.interop.peft import load_adapters
from vlm_jax.training.adapters import counts
from vlm_jax.training.loop import train

print(vlm_jax.__version__, "on", jax.devices())
folder = tempfile.mkdtemp()

# %% [markdown]
# ## Pictures, questions, answers
#
# Every record has `image`, `prompt` and `texts`, the answers that are right. Here they are drawn: captions of one shape, and questions about two. A table
# of your own is `dict(name="table", path="train.jsonl")` (docs/data.md).

# %%
directory = os.environ.get("VLM_JAX_WEIGHTS")
size, count = (224, 256) if directory else (64, 8)
tasks = dict(captions=dict(name="shapes_captions", split="train", size=size, count=count),
             questions=dict(name="shapes_questions", split="train", size=size, count=count, objects=2, kinds=["color", "shape", "place"]))

records = [build_source(settings)[index] for settings in tasks.values() for index in range(4)]
images, prompts = [record["image"] for record in records], [record["prompt"] for record in records]

# %% [markdown]
# ## A directory
#
# config.json, safetensors, tokenizer and preprocessor files. `vlm_jax.save` writes the small stand-in.


# %%
def write_stand_in(path: str) -> None:
    """A PaliGemma of one and two layers, random, with a tokenizer trained on the captions and questions above."""
    pixels, patch, width = 48, 12, 96
    tokens = dict(train_on=dict(name="mixture", sources=tasks), vocab_size=384, added=["<bos>", "\n"], marks=dict(bos="<bos>"))
    processor = Processor(image=[["decode", {}], ["resize", dict(size=pixels, method="bicubic")], ["value_range", dict(low=-1.0, high=1.0)]],
                          text=[["tokenize", dict(tokenizer=tokens)]],
                          format=dict(kind="prefix_lm", length=64, image_tokens=(pixels // patch) ** 2))
    model = dict(name="paligemma", scan=False, image=dict(image_size=pixels, patch_size=patch, width=width, depth=1, mlp_dim=2 * width, num_heads=4),
                 language=dict(vocab_size=448, width=width, depth=2, mlp_dim=2 * width, num_heads=4, num_kv_heads=1, norm="rms_plus_one",
                               activation="gelu_tanh", embed_scale=width ** 0.5))
    built = registry.build(**model)
    example = {name: np.zeros((1, *shape), np.float32 if name == "images" else np.int32) for name, shape in built.input_shapes().items()}
    params = jax.jit(built.init)(jax.random.key(0), example)["params"]
    vlm_jax.save(vlm_jax.Loaded(built, params, processor, dict(model=model), step=0), path)


if not directory:
    directory = os.path.join(folder, "stand_in")
    write_stand_in(directory)

print(*sorted(os.listdir(directory)), sep="\n")

# %%
base = vlm_jax.load(directory)
print(f"{base.config['model']['name']}: {sum(leaf.size for leaf in jax.tree.leaves(base.params)):,} parameters, {base.model.image_tokens()} tokens a picture")

# %% [markdown]
# ## Ask
#
# `answer` takes pictures (arrays, bytes of files, PIL images) and a prompt for each.

# %%
before = base.generator(batch_size=8).answer(images, prompts, max_tokens=12)
for prompt, answer in zip(prompts, before):
    print(f"{prompt!r:40} {answer!r}")

# %% [markdown]
# ## Tune
#
# A run as any other: `init_from` names the directory, `lora` the linear layers that get adapters. Only the adapters train. The same keys stand in config
# files; `configs/paligemma/paligemma_3b.py` is the recipe that tunes all parameters.

# %%
described = base.processor.to_dict()
stand_in = directory.startswith(folder)
config = dict(
    name="tuned", seed=0,
    model=base.config["model"],
    processor=dict(image=described["image"], text=[["tokenize", dict(tokenizer=dict(path=directory))]],
                   format=dict(described["format"], length=base.model.image_tokens() + 32)),
    task=dict(name="generation"),
    dtypes=dict(params="float32", softmax="float32", **(dict(compute="float32") if stand_in else dict(compute="bfloat16", frozen="bfloat16"))),
    stages=[dict(
        steps=180 if stand_in else 200,
        data=dict(pictures=dict(source=dict(name="mixture", sources=tasks), batch_size=16 if stand_in else 8)),
        init_from=dict(workdir=directory),
        lora=dict(targets=["language/.*", "projection"], rank=16 if stand_in else 8, alpha=32.0 if stand_in else 16.0),
        optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=0.0),
        schedule=dict(name="cosine", peak=1e-2 if stand_in else 2e-4, warmup=10),
    )],
    checkpoint=dict(every=1000, keep=1), log_every=25)
workdir = os.path.join(folder, "run")
summary = train(config, workdir)

# %%
run = vlm_jax.load(workdir)
print(counts(run.params))

# %% [markdown]
# ## Ask again

# %%
after = run.generator(batch_size=8).answer(images, prompts, max_tokens=12)

INK, GREY, RIGHT = "#24292f", "#57606a", "#1a7f37"
figure, axes = plt.subplots(2, 4, figsize=(11, 6.6), layout="constrained")
figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
for cell, record, first, second in zip(axes.flat, records, before, after):
    first, second = (" ".join(answer.split())[:28] or "(nothing)" for answer in (first, second))
    cell.imshow(record["image"], interpolation="bicubic")
    cell.set(xticks=[], yticks=[])
    cell.set_title(record["prompt"], loc="left", fontsize=10, fontweight="bold", color=INK)
    cell.annotate(f"before: {first}", (0, 0), (0, -7), xycoords="axes fraction", textcoords="offset points", va="top", fontsize=9, color=GREY)
    cell.set_xlabel(f"\nafter: {second}", loc="left", linespacing=1.4, fontsize=9, fontweight="bold", color=RIGHT if second in record["texts"] else INK)
    cell.spines[:].set_color("#d0d7de")
plt.show()

# %% [markdown]
# ## Hand it back
#
# The adapters alone, as PEFT reads them, or the whole model with the adapters merged, as transformers reads it. Tokenizer and preprocessor files of the
# directory go along.

# %%
tuned = dataclasses.replace(base, params=run.params)
for kind in ("peft", "hf"):
    path = os.path.join(folder, kind)
    vlm_jax.save(tuned, path, format=kind)
    print(f"{kind}: {', '.join(f'{name} ({os.path.getsize(os.path.join(path, name)):,} bytes)' for name in sorted(os.listdir(path)))}")

# %% [markdown]
# Both say what the run says.

# %%
adapted = dataclasses.replace(base, params=load_adapters(base, os.path.join(folder, "peft")))
merged = vlm_jax.load(os.path.join(folder, "hf"))
for kind, loaded in (("peft", adapted), ("hf", merged)):
    answers = loaded.generator(batch_size=8).answer(images, prompts, max_tokens=12)
    print(f"{kind}: {sum(map(str.__eq__, answers, after))} of {len(after)} answers are those of the run")
