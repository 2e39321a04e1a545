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
# # Search pictures by text
#
# A trained dual encoder places pictures and texts in one space. To search, embed the pictures once, embed the text, and take the pictures with the
# largest inner product.
#
# **To install**, in Colab or elsewhere, run this in the folder of the repository (upload or clone it first):
#
#     %pip install -q ".[notebooks]"
#
# The environment variable `VLM_JAX_RUN` names the workdir of a trained run, for example the one of `make demo`. Without it, two steps of a very small
# model are taken below: that shows how everything fits together, but it finds pictures no better than chance.

# %%
import os
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

import vlm_jax
from vlm_jax.data.decode import decode_image
from vlm_jax.data.sources import build_source

print(vlm_jax.__version__, "on", jax.devices())

# %% [markdown]
# ## A trained run

# %%
workdir = os.environ.get("VLM_JAX_RUN")
if not workdir:
    from vlm_jax.training.config import load_config
    from vlm_jax.training.loop import train

    workdir = os.path.join(tempfile.mkdtemp(), "run")
    train(load_config("configs/siglip/shapes.py:variant=test"), workdir)

run = vlm_jax.load(workdir)
predictor = run.predictor()
print(f"{run.config['name']} at step {run.step:,}: {sum(leaf.size for leaf in jax.tree.leaves(run.params)):,} parameters")

# %% [markdown]
# ## Pictures that it was not trained on
#
# The first evaluation of the run says where they are. (A run without evaluations shows its training pictures.)

# %%
sections = [*run.config["evaluations"].values(), *run.config["stages"][-1]["data"].values()]
source = build_source(sections[0]["source"])
records = [source[index] for index in range(min(len(source), 1000))]
pictures = [decode_image(record["image"], source.describe(index)) for index, record in enumerate(records)]
names = [(record.get("texts") or [f"picture {index}"])[0] for index, record in enumerate(records)]

picture_embeddings = predictor.embed_images(pictures)
print(f"{len(pictures)} pictures, each a vector of {picture_embeddings.shape[1]} numbers")

# %% [markdown]
# ## Search
#
# Put your own texts here.

# %%
texts = list(dict.fromkeys(names))[:: max(1, len(set(names)) // 4)][:4]

scores = predictor.embed_texts(texts) @ picture_embeddings.T
best = np.argsort(-scores, axis=1)[:, :5]

# %%
figure, axes = plt.subplots(len(texts), best.shape[1], figsize=(2 * best.shape[1], 2.9 * len(texts)), squeeze=False, layout="constrained")
figure.get_layout_engine().set(h_pad=0.14)
for row, text, found, score in zip(axes, texts, best, scores):
    for cell, index in zip(row, found):
        cell.imshow(pictures[index])
        cell.set(xticks=[], yticks=[])
        cell.set_xlabel(f"{names[index]}\n{score[index]:.3f}", fontsize=8)
        cell.spines[:].set_color("#d0d7de")
    row[0].set_title(text, loc="left", fontweight="bold", fontsize=10)
plt.show()
