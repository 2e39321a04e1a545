"""What the configs of dual encoders share: the layout on a topology, preprocessing lists and the evaluations of the quickstart."""
from collections.abc import Sequence
from typing import Any

import ml_collections as ml

from vlm_jax.evaluation.class_names import ENSEMBLE, WORDNET
from vlm_jax.sharding.layouts import layout
from vlm_jax.training.config import parse_arg

# Radford et al. 2021, the statistics that the released models were trained with.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
CLIP_VALUES = [["value_range", {"low": 0.0, "high": 1.0}], ["normalize", {"mean": CLIP_MEAN, "std": CLIP_STD}]]


def published_arg(arg: str | None, shards: str, tokenizer: str) -> ml.ConfigDict:
    """Reads the argument of a published recipe for pairs: variant, shards, tokenizer, data_dir, class_names, templates, topology and layout."""
    return parse_arg(arg, variant="full", shards=shards, tokenizer=tokenizer, data_dir="", class_names=WORDNET, templates=ENSEMBLE, topology="", layout="auto")


def lay_out(config: ml.ConfigDict, arg: ml.ConfigDict, default: str, parameters: int) -> None:
    """Fills `mesh`, `sharding` and `topology` of a config by `arg.topology` and `arg.layout`; without a topology the batch is split over what is there.

    Args:
      default: the topology that the full variant is for where the argument names none; "" for small configs.
      parameters: of the full variant's model, for `layout="auto"`.
    """
    test = arg.variant == "test"
    topology = arg.topology or ("" if test else default)
    if topology:
        config.update(layout(arg.layout, topology, 1_000_000 if test else parameters))
        config.topology = topology


def study_stage(test: bool, steps: int, source: dict, batch_size: int, warmup: int, stream: str = "pairs", **overrides: Any) -> dict:
    """A stage of the small studies on drawn pictures: all parameters by AdamW whose decay follows the learning rate, which falls from 1e-3 by a cosine.

    The test variant takes two steps of eight examples. `overrides` are other settings of the stage.
    """
    return {**dict(
        steps=2 if test else steps,
        data={stream: dict(source=source, batch_size=8 if test else batch_size)},
        train=[(r".*", {})],
        optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=1e-4, decay_by="schedule"),
        schedule=dict(name="cosine", peak=1e-3, warmup=1 if test else warmup),
        clip=1.0,
    ), **overrides}


def pictures(size: int, low: float = -1.0, high: float = 1.0, method: str = "bilinear") -> list:
    """Image operations of SigLIP: decode, resize to a square whatever the aspect ratio, map 0..255 linearly to low..high."""
    return [["decode", {}], ["resize", {"size": size, "method": method}], ["value_range", {"low": low, "high": high}]]


def clip_pictures(size: int) -> list:
    """Image operations of CLIP at evaluation: shortest side by bicubic, centre crop, the statistics of its training set."""
    return [["decode", {}], ["resize_shortest", {"size": size, "method": "bicubic"}], ["center_crop", {"size": size}], *CLIP_VALUES]


def trained_text(source: dict, vocab_size: int, length: int) -> list:
    """Text operations of the quickstart: lower-case, SentencePiece trained on the captions of `source`, SigLIP's sticky end of sentence."""
    tokenizer = {"train_on": source, "vocab_size": vocab_size}
    return [["lowercase", {}], ["strip", {}], ["tokenize", {"tokenizer": tokenizer, "length": length, "eos": "sticky"}]]


def loaded_text(path: str, length: int, *, canonical: bool) -> list:
    """Text operations of the published models: a SentencePiece file, end of sentence kept when a caption is cut."""
    first = "canonicalize" if canonical else "lowercase"
    return [[first, {}], ["tokenize", {"tokenizer": {"path": path}, "length": length, "eos": "sticky"}]]


def retrieval(source: dict, every: int, **settings: Any) -> dict:
    """An evaluation section: retrieval both ways on a source."""
    return dict(evaluator="retrieval", source=source, every=every, **settings)


def zero_shot(source: dict, every: int, templates: str | Sequence[str] = ("{}",), **settings: Any) -> dict:
    """An evaluation section: zero-shot classification over the class names of a source."""
    return dict(evaluator="zero_shot", source=source, every=every, templates=templates if isinstance(templates, str) else list(templates), **settings)


def imagenet(arg: ml.ConfigDict) -> dict:
    """An evaluation section of the published recipes: ImageNet's validation split, prepared from TFDS, with an ensemble of prompts.

    `arg` has `data_dir`; `class_names`, by which WordNet ids become readable (evaluation/class_names.py says which files do); and `templates`, "ensemble" or
    a file with one prompt a line.
    """
    source = dict(name="tfds", dataset="imagenet2012", split="validation", data_dir=arg.data_dir)
    return zero_shot(source, 20_000, templates=arg.templates, class_names=arg.class_names)
