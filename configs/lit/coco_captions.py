"""LiT on COCO captions: a text tower learns to read a locked, pre-trained image tower. Zhai et al. 2022, "LiT".

Prepare:  python -m vlm_jax.data.prepare coco_captions
Launch:   python -m vlm_jax.train --config configs/lit/coco_captions.py:init=runs/my_image_tower,tokenizer=c4_en.model --workdir runs/lit_coco
Expected: no figure is published for this data alone. Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/lit/coco_captions.py:variant=test --workdir runs/lit_coco_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, loaded_text, pictures, retrieval, trained_text
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,init=WORKDIR,tokenizer=FILE,data_dir=...,topology=v5e-8,layout=auto"."""
    arg = parse_arg(arg, variant="full", init="", tokenizer="c4_en.model", data_dir="", topology="", layout="auto")
    test = arg.variant == "test"
    if test:
        source, held_out = dict(name="shapes", split="train", size=32), dict(name="shapes", split="validation", size=32, limit=8)
        text = trained_text(dict(source, limit=1000), vocab_size=300, length=16)
    else:
        source = dict(name="tfds", dataset="coco_captions", split="train", data_dir=arg.data_dir)
        held_out = dict(source, split="val")
        text = loaded_text(arg.tokenizer, 16, canonical=False)

    config = ml.ConfigDict()
    config.name = "lit_coco_captions"
    config.seed = 0
    config.model = dict(name="lit", preset="test" if test else "b16-b")
    config.processor = dict(image=pictures(24 if test else 224), text=text)
    config.task = dict(name="contrastive", loss="softmax")
    lay_out(config, arg, "v5e-8", parameters=196_033_537)
    config.stages = [dict(
        steps=2 if test else 5_000,
        data=dict(pairs=dict(source=source, batch_size=8 if test else 512)),
        train=[(r"image/.*", None), (r".*", {})],
        optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=1e-4, decay_by="schedule"),
        schedule=dict(name="cosine", peak=1e-3, warmup=1 if test else 500),
        clip=1.0,
        init_from=dict(workdir=arg.init, mapping=[(r"(image/.*)", r"\1")]) if arg.init else None,
    )]
    config.evaluations = dict(search=retrieval(held_out, 2 if test else 1_000))
    config.checkpoint = dict(every=2 if test else 1_000, keep=2)
    config.log_every = 1 if test else 20
    return config
