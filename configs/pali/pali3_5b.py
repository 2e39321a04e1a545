"""PaLI-3-5B tuned to a task with its image tower frozen. Chen et al., "PaLI-3" (2023), section 2 (per-task tuning with a frozen ViT).

Your data: a JSONL or CSV table whose records have `image`, `prompt` and `texts`. `init` is the workdir of configs/pali/pali3_5b_pretrain.py; positions are
resampled where its resolution is another. Learning rate and steps are a choice of ours.
`validation` is another such table, of records that `data` has not: without it nothing is evaluated, since training
records say nothing about new ones.

Launch:   python -m vlm_jax.train --config configs/pali/pali3_5b.py:data=train.jsonl,validation=val.jsonl,tokenizer=FOLDER,init=gs://BUCKET/pali3 --workdir gs://BUCKET/run
Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/pali/pali3_5b.py:variant=test --workdir runs/pali3_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, pictures
from vlm_jax.configs.pali.recipe import LOCATIONS, held_out, loaded_text, trained_text
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is a choice of

    "variant=full|test,resolution=224|812|1064,data=...,validation=...,tokenizer=...,init=...,steps=10000,topology=v5e-16,layout=fsdp".
    """
    arg = parse_arg(arg, variant="full", resolution=812, data="train.jsonl", validation="",
                    tokenizer="ul2", init="", steps=10_000, topology="", layout="fsdp")
    test = arg.variant == "test"
    size, patch = (24, 8) if test else (arg.resolution, 14)
    patches = (size // patch) ** 2
    drawn = dict(name="shapes_captions", split="train", size=32)

    config = ml.ConfigDict()
    config.name = "pali3_5b"
    config.seed = 0
    config.model = dict(name="pali", preset="test") if test else dict(name="pali", preset="pali-3-5b", image=dict(image_size=size), remat="full")
    config.processor = dict(
        image=pictures(size), text=trained_text(drawn, 384) if test else loaded_text(arg.tokenizer, [LOCATIONS]),
        format=dict(kind="encoder_decoder", length=patches + (16 if test else 128), target_length=16 if test else 128, image_tokens=patches))
    config.task = dict(name="generation")
    lay_out(config, arg, "v5e-16", 4_900_000_000)
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32", frozen="float32" if test else "bfloat16")
    config.stages = [dict(
        steps=2 if test else arg.steps,
        data=dict(tuning=dict(source=drawn if test else dict(name="table", path=arg.data), batch_size=8 if test else 32, workers=0 if test else 16)),
        train=[(r"image/.*", None), (r".*", {})],
        optimizer=dict(name="adafactor", b1=0.0, decay_cap=0.8),
        schedule=dict(name="rsqrt", peak=1e-3, warmup=1 if test else 1_000, timescale=1_000),
        clip=1.0,
        **(dict(init_from=dict(workdir=arg.init)) if arg.init and not test else {}),
    )]
    config.evaluations = held_out(arg.validation, test, 2_000)
    config.checkpoint = dict(every=2 if test else 1_000, keep=2)
    config.log_every = 1 if test else 20
    return config
