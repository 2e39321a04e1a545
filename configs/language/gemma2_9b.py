"""Gemma 2 9B tuned to write the targets of a table of prompts and texts. Gemma Team, "Gemma 2" (2024), table 1 for the sizes; the settings of tuning are ours.

Your data: a JSONL or CSV table whose records have `prompt` and `texts`; no pictures are read. The tokenizer is the release's SentencePiece file or folder.
Published weights come in through `init`: DIR, a local directory in the Hugging Face layout, or a workdir (also on gs://).
`validation` is another such table, of records that `data` has not: without it nothing is evaluated, since training
records say nothing about new ones.

Launch:   python -m vlm_jax.train --config configs/language/gemma2_9b.py:data=train.jsonl,validation=val.jsonl,tokenizer=DIR,init=DIR --workdir gs://BUCKET/run
Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/language/gemma2_9b.py:variant=test --workdir runs/gemma2_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out
from vlm_jax.configs.pali.recipe import held_out, loaded_text, trained_text
from vlm_jax.training.config import parse_arg

PARAMETERS = 9_241_705_984
TEST = dict(depth=2, width=24, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=388, window=12)


def get_config(arg=None):
    """Returns the config; `arg` is a choice of

    "variant=full|test,length=1024,data=...,validation=...,tokenizer=...,init=...,steps=5000,topology=v5e-64,layout=fsdp".
    """
    arg = parse_arg(arg, variant="full", length=1024, data="train.jsonl", validation="",
                    tokenizer="gemma2.model", init="", steps=5_000, topology="", layout="fsdp")
    test = arg.variant == "test"
    drawn = dict(name="shapes_captions", split="train", size=32)
    texts = dict(name="table", path=arg.data, image=None)

    config = ml.ConfigDict()
    config.name = "gemma2_9b"
    config.seed = 0
    config.model = dict(name="decoder", preset="gemma2-9b", **(TEST if test else dict(remat="full")))
    config.processor = dict(text=trained_text(drawn, 384, ["<bos>", "\n"]) if test else loaded_text(arg.tokenizer),
                            format=dict(kind="causal", length=24 if test else arg.length, begin="<bos>", separator="\n"))
    config.task = dict(name="generation")
    lay_out(config, arg, "v5e-64", PARAMETERS)
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32")
    config.stages = [dict(
        steps=2 if test else arg.steps,
        data=dict(tuning=dict(source=drawn if test else texts, batch_size=8 if test else 64, workers=0 if test else 8)),
        train=[(r".*", {})],
        optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=1e-6),
        schedule=dict(name="cosine", peak=1e-5, warmup=1 if test else arg.steps // 20),
        clip=1.0,
        **(dict(init_from=dict(workdir=arg.init)) if arg.init and not test else {}),
    )]
    config.evaluations = held_out(arg.validation, test, 1_000, images=False, source=dict(image=None))
    config.checkpoint = dict(every=2 if test else 1_000, keep=2)
    config.log_every = 1 if test else 20
    return config
