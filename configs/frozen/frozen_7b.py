"""Frozen: an NF-ResNet-50 from scratch, its pooled vector as two embeddings, a language model of 7 billion parameters. Tsimpoukelli et al. 2021, section 3.

Facts: Conceptual Captions, one picture and its caption an example, pictures of 224 pixels padded to squares, the language model frozen, Adam at a constant
3e-4, batches of 128, stopped where the loss on the validation set was lowest. Unsure: Adam's 0.9 and 0.95. Not known: how many steps that were (here four
passes). Nothing stops by itself here: `validation` names a table of captions for every 5,000 steps, whose checkpoints are kept; load the best by its step.

Your data: FOLDER/cc3m-*.tar (pairs, docs/data.md). `language` is a run or directory of a model with these sizes (models/frozen_presets.py), since that of the
paper is not published; for another one change `config.model`.

Launch:   python -m vlm_jax.train --config configs/frozen/frozen_7b.py:data=FOLDER,tokenizer=FILE,language=DIR --workdir gs://BUCKET/run
Expected: VQAv2 without having seen its training set 29.5 %, with four shots 38.2 % (quoted, section 4). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/frozen/frozen_7b.py:variant=test --workdir runs/frozen_7b_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, pictures
from vlm_jax.configs.flamingo.recipe import MEAN
from vlm_jax.configs.pali.recipe import held_out, loaded_text, trained_text
from vlm_jax.training.config import parse_arg

EXAMPLES, BATCH = 3_000_000, 128


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,data=FOLDER,tokenizer=...,language=...,validation=TABLE,topology=v5e-32,layout=auto"."""
    arg = parse_arg(arg, variant="full", data="data", tokenizer="tokenizer.model", language="", validation="", topology="", layout="auto")
    test = arg.variant == "test"
    words = dict(name="shapes", split="train", size=24, limit=500)
    pairs = dict(words, limit=None) if test else dict(name="tar", path=f"{arg.data}/cc3m-*.tar")
    config = ml.ConfigDict()
    config.name = "frozen_7b"
    config.seed = 0
    config.model = dict(name="frozen", preset="test") if test else dict(name="frozen", preset="frozen-7b", remat="full")
    config.processor = dict(
        image=pictures(24) if test else [["decode", {}], ["pad_to_square", {"color": MEAN}], *pictures(224)[1:]],
        text=trained_text(words, 300, ["<s>"]) if test else loaded_text(arg.tokenizer),
        format=dict(kind="interleaved", length=24 if test else 48, pictures=1, span="start", begin="<s>" if test else False, image_text=False, chunk_end=False,
                    image_tokens=2))
    config.task = dict(name="generation")
    lay_out(config, arg, "v5e-32", parameters=6_600_000_000)
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32", frozen="float32" if test else "bfloat16")
    start = dict(init_from=dict(workdir=arg.language, mapping=[(r"(.*)", r"language/\1")])) if arg.language and not test else {}
    config.stages = [dict(
        steps=2 if test else 4 * EXAMPLES // BATCH,
        data=dict(captions=dict(source=dict(name="image_text_order", source=pairs, text_first=0.0, space=0.0), batch_size=8 if test else BATCH,
                                workers=0 if test else 16)),
        train=[(r"(image|projection)/.*", {}), (r".*", None)],
        optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=0.0),
        schedule=dict(name="constant", peak=3e-4),
        **start)]
    config.evaluations = held_out(arg.validation, test, 5_000)
    config.checkpoint = dict(every=2 if test else 1_000, keep=2, keep_every=5_000)
    config.log_every = 1 if test else 20
    return config
