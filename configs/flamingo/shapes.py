"""A small Flamingo on drawn shapes: few-shot learning of invented words, questions and captions from interleaved pictures and text. Alayrac et al. 2022.

Does a frozen language model learn from pictures in its context what a new word means? As in the paper an image tower that was trained contrastively and a
language model that was trained on text alone stay as they are; resampler, gated cross-attention and the mark of a chunk's end are trained between them, on
documents of at most five pictures. Evaluated with up to 32 (experiments/flamingo_fewshot) on words and concepts that no stage has seen.

Stages: 1. image tower, SigLIP on captions; 2. language model, on the text side of the same world; 3. Flamingo, both frozen.

Launch:   python -m vlm_jax.train --config configs/flamingo/shapes.py --workdir runs/flamingo_shapes
Target:   8 shots at least 20 points above none, pictures at least 20 points above shuffled ones; under 60 minutes on two CPU cores.
Measured: not reached. The language model of stage 2 copies words from its context, but chooses among them at chance, so that stage 3 cannot bind them either
          (2026-11-21, several runs of 500 to 1,500 steps of that stage alone; no run of the whole).
Try here: python -m vlm_jax.train --config configs/flamingo/shapes.py:variant=test --workdir runs/flamingo_shapes_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, pictures, trained_text as padded_text
from vlm_jax.training.config import parse_arg

PICTURES = 5            # of a document in training: four examples and the query
CHUNK_END = "<|endofchunk|>"
VOCABULARY = 512        # pieces of the tokenizer


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,vision=700,language=1500,steps=1500,topology=...,layout=auto"."""
    arg = parse_arg(arg, variant="full", vision=700, language=1500, steps=1500, topology="", layout="auto")
    test = arg.variant == "test"
    size = 24 if test else 32
    batch = 4 if test else 64

    def texts(fewest: int, most: int, **settings) -> dict:
        """The text side: mostly episodes in which descriptions stand for the pictures."""
        shown = dict(kinds=["binding", "binding", "binding", "vqa", "caption"], shots=[fewest, most], ways=[2, 4], loss="all")
        return dict(name="shapes_texts", split="train", kinds=["description", "question", *["episode"] * 4], episodes=shown, **settings)

    tokenizer = {"train_on": texts(1, 4, count=2000), "vocab_size": VOCABULARY, "model_type": "bpe", "added": ["<s>", "<image>", CHUNK_END]}
    text = [["lowercase", {}], ["tokenize", {"tokenizer": tokenizer}]]

    def episodes(split: str, **settings) -> dict:
        return dict(dict(name="shapes_episodes", split=split, size=size, ways=[2, 4] if split == "train" else 2), **settings)

    config = ml.ConfigDict()
    config.name = "flamingo_shapes"
    config.seed = 0
    # The end of a chunk is the one token that the language model does not know.
    config.model = dict(name="flamingo", preset="test" if test else "shapes", language=dict(vocab_size=VOCABULARY + 2))
    form = dict(kind="interleaved", span="start", begin="<s>", chunk_end=CHUNK_END)
    config.processor = dict(image=pictures(size, -2.0, 0.0), text=text, format=dict(form, length=72, pictures=3 if test else PICTURES))
    config.task = dict(name="generation")
    lay_out(config, arg, "", parameters=10_000_000)

    def adamw(peak: float, warmup: int, **settings) -> dict:
        return dict(optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=1e-4, decay_by="schedule"),
                    schedule=dict(name="cosine", peak=peak, warmup=1 if test else warmup), clip=1.0, **settings)

    seen = {name: dict(name="shapes", split="train", size=size, objects=1, captions=captions)
            for name, captions in (("named", "simple"), ("placed", "detailed"))}
    vision = dict(
        steps=2 if test else arg.vision,
        model=dict(name="siglip", preset="test" if test else "shapes", image=dict(image_size=size)),
        processor=dict(text=padded_text(dict(seen["placed"], count=1000), vocab_size=300, length=16), format=None),
        task=dict(name="contrastive", loss="sigmoid"),
        data=dict(pairs=dict(source=dict(name="mixture", sources=seen), batch_size=8 if test else 128)),
        train=[(r".*", {})], **adamw(1e-3, 50))
    # As long as documents of 32 pictures will be: in most steps of the language model's training contexts are short.
    lengths = dict(short=(96, batch, texts(1, 8)), **({} if test else dict(long=(288, batch // 8, texts(16, 28)))))
    language = dict(
        steps=2 if test else arg.language,
        init_from=dict(previous=True, mapping=[(r"(image/(?!pooling).*)", r"\1")]),
        data={name: dict(source=source, batch_size=rows, processor=dict(image=[], text=text, format=dict(form, length=length, pictures=0)))
              for name, (length, rows, source) in lengths.items()},
        train=[(r"language/(?!new_).*", {}), (r".*", None)], **adamw(2e-3, 100))
    flamingo = dict(
        steps=2 if test else arg.steps,
        init_from=dict(previous=True),
        data=dict(episodes=dict(source=episodes("train", shots=[0, 2] if test else [0, PICTURES - 1]), batch_size=batch)),
        train=[(r"(resampler|gated)/.*", {}), (r"language/new_.*", {}), (r".*", None)], **adamw(1e-3, 100))
    config.stages = [vision, language, flamingo]
    shots = [0, 1] if test else [0, 4, 8]
    asked = dict(name="shapes_episodes", split="validation", size=size, kinds=["binding"], ways=2, shots=max(2, shots[-1]), count=8 if test else 200)
    # At the end: the stages before cannot answer.
    config.evaluations = dict(few_shot=dict(evaluator="few_shot", source=asked, shots=shots, every=6 if test else 10_000))
    config.checkpoint = dict(every=2 if test else 250, keep=2)
    config.log_every = 1 if test else 20
    return config
