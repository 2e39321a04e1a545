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
# # Flamingo: answers by example
#
# A Flamingo is a language model between whose layers gated cross-attention reads pictures. It is asked by example: pictures with their answers stand before
# a question, in one document, and no parameter changes. This notebook looks inside one, trains a very small one from nothing for a minute or two, and asks it
# behind 0, 1 and 4 examples.
#
# **To install**, in Colab or elsewhere, run this in the folder of the repository (upload or clone it first):
#
#     %pip install -q ".[notebooks]"
#
# Nothing is downloaded. A minute is enough to see how everything fits together, and for little more than the habit of answering as the examples do; what
# small Flamingos learn in an hour is in `configs/flamingo/shapes.py` and `experiments/flamingo_fewshot`.

# %%
import os
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

import vlm_jax
from vlm_jax import registry
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import build_source
from vlm_jax.decoding import prefix_cache
from vlm_jax.evaluation import evaluate
from vlm_jax.evaluation.likelihood import rank
from vlm_jax.training.loop import train

print(vlm_jax.__version__, "on", jax.devices())
folder = tempfile.mkdtemp()
INK, GREY, LINE, COLORS = "#24292f", "#57606a", "#d0d7de", ["#0969da", "#bf3989", "#1a7f37", "#9a6700", "#8250df"]

# %% [markdown]
# ## A document
#
# Texts and pictures in reading order. Here they are drawn: the question is always the same, and only the examples show what is meant by it, the colour, the
# shape, the place or the size. (`kinds=["binding"]` binds invented words to things, which takes longer to learn.)

# %%
size, shots = 24, 4
episodes = dict(name="shapes_episodes", kinds=["vqa"], size=size, bank=32)
training = dict(episodes, split="train", shots=[0, shots])
record = build_source(dict(episodes, split="train", shots=2))[5]

for segment in record["segments"]:
    print(segment["text"] if segment["kind"] == "text" else "(picture)", end="  ")

# %% [markdown]
# The processor makes arrays of it. A picture is one token, `<image>`; its pixels stand in `images`, and `media_index` says which of them a token reads: the
# last one at or before it. Targets (`loss_weights`) are the answers and the marks behind them.

# %%
MARKS = ["<s>", "<image>", "<|endofchunk|>"]
texts = dict(name="shapes_texts", split="train", kinds=["question", "episode"], count=800, episodes=dict(kinds=["vqa"], shots=[2, 4]))
words = dict(train_on=texts, vocab_size=448, model_type="bpe", added=MARKS)
settings = dict(
    image=[["decode", {}], ["resize", dict(size=size)], ["value_range", dict(low=-2.0, high=0.0)]],
    text=[["tokenize", dict(tokenizer=words)]],
    format=dict(kind="interleaved", length=64, pictures=shots + 1, begin="<s>", chunk_end="<|endofchunk|>"))
processor = Processor(**settings)
arrays = processor(record)
print({name: (array.shape, str(array.dtype)) for name, array in arrays.items()})


# %%
def draw_document(record: dict, arrays: dict) -> None:
    """The tokens of a document in the colour of the picture that they read, the targets underlined."""
    count = int(arrays["valid"].sum())
    pictures = [segment["image"] for segment in record["segments"] if segment["kind"] == "image"]
    figure, axes = plt.subplots(figsize=(11, 2.5), layout="constrained")
    place, centres = 0.0, {}
    for number in range(count):
        text = processor.tokenizer.piece(int(arrays["tokens"][number])).replace("▁", " ").replace("<|endofchunk|>", "<eoc>")
        media = int(arrays["media_index"][number])
        width = 0.75 * len(text) + 0.5
        axes.text(place + width / 2, 0, text, ha="center", va="center", fontsize=9, family="monospace", color=COLORS[media] if media >= 0 else GREY)
        if arrays["loss_weights"][number]:
            axes.plot([place + 0.1, place + width - 0.1], [-0.55, -0.55], color=COLORS[media] if media >= 0 else GREY, linewidth=2)
        if text.strip() == "<image>":
            centres[media] = place + width / 2
        place += width
    for media, centre in centres.items():
        cell = axes.inset_axes([centre - 4, 0.8, 8, 3.4], transform=axes.transData)
        cell.imshow(pictures[media])
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set(color=COLORS[media], linewidth=2.5)
    axes.set(xlim=(0, place), ylim=(-1.2, 4.4))
    axes.axis("off")
    plt.show()


draw_document(record, arrays)

# %% [markdown]
# ## Who reads what
#
# Left: the tokens read each other, up to their own. Right: what the cross-attention lets them read: a picture's vectors stand for the tokens behind its mark
# alone. The answers before it reach a token through the text.

# %%
count, latents = int(arrays["valid"].sum()), 4
names = [processor.tokenizer.piece(int(token)).replace("▁", " ").replace("<|endofchunk|>", "<eoc>") for token in arrays["tokens"][:count]]
before = np.tril(np.ones((count, count)))
reads = arrays["media_index"][:count, None] == np.repeat(np.arange(3), latents)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 5.6), width_ratios=[2.2, 1], layout="constrained")
left.imshow(before, cmap="Greys", vmax=2)
left.set(xticks=[], title="self-attention of the language model")
shown = np.where(reads[..., None], np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in np.repeat(COLORS[:3], latents)]) / 255, 1.0)
right.imshow(shown, aspect="auto")
right.set(xticks=[1.5, 5.5, 9.5], title="cross-attention")
right.set_xticklabels([f"picture {k}" for k in range(3)], fontsize=8)
for axes in (left, right):
    axes.set_yticks(range(count), names, fontsize=7, family="monospace")
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=0.5)
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_color(LINE)
    axes.title.set_fontsize(10)
plt.show()

# %% [markdown]
# ## Gates at 0 are the language model
#
# Every new block adds its result times tanh of a gate. Gates start at 0, so that the model is the language model, to the last bit, whatever the pictures; its
# parameters lie in `params["language"]` as they were.

# %%
vocabulary = processor.vocab_size
model_settings = dict(name="flamingo", preset="test", image=dict(image_size=size), language=dict(vocab_size=vocabulary, depth=2, new_tokens=0),
                      gated=dict(every=1), resampler=dict(depth=1), scan=False)
model = registry.build(**model_settings)
inputs = {name: arrays[name][None] for name in ("tokens", "valid", "images", "media_index")}
params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
for name, part in params.items():
    print(f"{name:10} {sum(leaf.size for leaf in jax.tree.leaves(part)):9,} parameters")

read = jax.jit(lambda params, inputs: model.apply({"params": params}, inputs)[0])
_, decoder = model.parts()
alone = jax.jit(lambda params, inputs: decoder.apply({"params": params}, inputs)[0])(params["language"], {name: inputs[name] for name in ("tokens", "valid")})
logits = read(params, inputs)
opened = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + 0.5 if "gate_" in str(path[-1]) else leaf, params)
print("gates at 0.0: largest difference from the language model", float(abs(logits - alone)[0, :count].max()))
print("gates at 0.5: largest difference from the language model", float(abs(read(opened, inputs) - alone)[0, :count].max()))

# %% [markdown]
# With the gates open, change the second picture: no token before it notices. Those that read it do, and so do those behind the third picture, through the text.

# %%
other = dict(inputs, images=inputs["images"].copy())
other["images"][:, 1] += 1.0
noticed = np.asarray(abs(read(opened, other) - read(opened, inputs)).max(-1))[0, :count]
figure, axes = plt.subplots(figsize=(11, 2.2), layout="constrained")
axes.bar(range(count), noticed, color=[COLORS[media] if media >= 0 else GREY for media in arrays["media_index"][:count]])
axes.set_xticks(range(count), names, rotation=90, fontsize=8, family="monospace")
axes.set(title="how much the logits of each token change with the second picture (colours: the picture that it reads)", xlim=(-0.6, count - 0.4))
axes.title.set_fontsize(10)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Train one
#
# A config like those in `configs/`. There the image tower and the language model are trained before, and frozen; here, for lack of time, everything starts
# from nothing and is trained. (The tests set `VLM_JAX_STEPS` and stop much earlier.)

# %%
workdir = os.path.join(folder, "run")
config = dict(
    name="flamingo_notebook", seed=0, model=model_settings, processor=settings, task=dict(name="generation"),
    stages=[dict(
        steps=int(os.environ.get("VLM_JAX_STEPS", 400)), data=dict(episodes=dict(source=training, batch_size=16)), train=[(".*", {})],
        optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=0.0), schedule=dict(name="cosine", peak=3e-3, warmup=4), clip=1.0)],
    checkpoint=dict(every=1000, keep=1), log_every=100)
summary = train(config, workdir)
run = vlm_jax.load(workdir)
gates = run.params["gated"]["blocks"]
print("gates, tanh:", {name: np.tanh(gates[name]).round(2).tolist() for name in ("gate_cross", "gate_mlp")})

# %% [markdown]
# ## Ask behind examples
#
# The evaluator `few_shot` puts 0, 1 and 4 examples before each question and takes the likeliest of all 31 answers (`docs/few_shot.md`). Without examples
# nobody can know what is asked; one shows it. After so short a training the answers are of the right kind more often than they are right.

# %%
questions = dict(episodes, split="validation", shots=shots, count=32)
generator = run.generator(batch_size=32)
numbers = [0, 1, shots]
asked = dict(evaluator="few_shot", source=questions, shots=numbers, zero_shot="none")
metrics = evaluate("questions", asked, generator, os.path.join(folder, "few_shot"))
accuracy, error = ([metrics[f"{name}/{number}_shots"] for number in numbers] for name in ("accuracy", "standard_error"))

figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
axes.errorbar(numbers, accuracy, error, color=COLORS[2], marker="o", capsize=3)
axes.axhline(metrics["chance"], color=GREY, linestyle=":")
axes.text(shots, metrics["chance"] + 0.02, "chance", ha="right", color=GREY, fontsize=9)
axes.set(xticks=numbers, xlabel="shots", ylabel=f"accuracy, {metrics['queries']:.0f} questions", ylim=(0, 1))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Examples that stay
#
# Where all questions share their examples, these are read once: `prefix_cache` keeps keys and values of the text and of the pictures.

# %%
source = build_source(questions)
records = [source[index] for index in range(len(source)) if source[index]["style"] == "color"][:6]
example, chunk_end = records[0], dict(kind="chunk_end")
context = [segment for one in example["support"] for segment in (*one, chunk_end)]
prefix = prefix_cache(run.model, run.params, run.processor.documents([context]))
batch = run.processor.format.batch([run.processor.document(one["query"], begin=False) for one in records])
answers = ["red", "green", "blue", "yellow", "orange", "purple", "brown", "black", "gray", "turquoise"]
candidates = [run.processor.format.tokenizer.encode(answer) + run.processor.format.end[-1:] for answer in answers]
cached = rank(run.model, run.params, batch, candidates, prefix=prefix)
whole = rank(run.model, run.params, run.processor.documents([[*context, *one["query"]] for one in records]), candidates)
print("tokens read for each question:", batch["tokens"].shape[1], "instead of", batch["tokens"].shape[1] + prefix.tokens.shape[1])
print("largest difference of a log-likelihood:", float(abs(cached - whole).max()))

figure, axes = plt.subplots(1, len(example["support"]) + len(records), figsize=(11, 1.9), layout="constrained")
shown = [(one[0]["image"], one[-1]["text"], INK, LINE) for one in example["support"]]
for one, scores in zip(records, cached):
    answer = answers[int(np.argmax(scores))]
    shown.append((one["image"], f"{answer}?", COLORS[2] if answer == one["attributes"]["color"] else COLORS[1], COLORS[0]))
for cell, (image, text, color, edge) in zip(axes, shown):
    cell.imshow(image)
    cell.set(xticks=[], yticks=[])
    cell.set_xlabel(text, color=color, fontsize=10)
    cell.spines[:].set(color=edge, linewidth=1.5)
figure.suptitle("examples, read once  |  questions", fontsize=10, color=INK)
plt.show()

# %% [markdown]
# ## Published weights
#
# A directory in the layout of IDEFICS on Hugging Face's hub, read and written without torch. This one is made here, small and with random weights; a download
# of `HuggingFaceM4/idefics-9b` is read the same way (`docs/few_shot.md` also says how OpenFlamingo's files are).

# %%
AROUND = "<fake_token_around_image>"
idefics_words = dict(words, added=["<s>", AROUND, "<image>"])
idefics_processor = Processor(
    image=[["decode", {}], ["resize", dict(size=24, method="bicubic")], ["value_range", dict(low=0.0, high=1.0)]],
    text=[["tokenize", dict(tokenizer=idefics_words)]],
    format=dict(kind="interleaved", length=64, pictures=5, begin="<s>", chunk_end=False, image_text=f"{AROUND}<image>{AROUND}"))
idefics_settings = dict(name="idefics", preset="test", language=dict(vocab_size=idefics_processor.vocab_size - 2, depth=4, new_tokens=2))
idefics = registry.build(**idefics_settings)
shapes = {name: np.zeros((1, *shape), np.float32 if name == "images" else np.int32) for name, shape in idefics.input_shapes().items()}
idefics_params = jax.jit(idefics.init)(jax.random.key(1), shapes)["params"]
written = vlm_jax.Loaded(idefics, idefics_params, idefics_processor, dict(model=idefics_settings), step=0)
directory = os.path.join(folder, "idefics")
vlm_jax.save(written, directory)
print(*(f"{name} ({os.path.getsize(os.path.join(directory, name)):,} bytes)" for name in sorted(os.listdir(directory))), sep="\n")

# %%
loaded = vlm_jax.load(directory)
same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), dict(loaded.params), dict(idefics_params))
print(type(loaded.model).__name__, "with", f"{sum(leaf.size for leaf in jax.tree.leaves(loaded.params)):,} parameters, all as they were:",
      all(jax.tree.leaves(same)))
print(loaded.processor)
