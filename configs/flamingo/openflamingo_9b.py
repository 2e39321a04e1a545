"""OpenFlamingo-9B: CLIP L/14 and MPT-7B, frozen, on LAION-2B and Multimodal C4. Awadalla et al., "OpenFlamingo" (2023), section 3.

Facts: loss weights 1.0 and 0.2, pages of at most six pictures and 256 tokens, pictures matched to sentences by a similarity of at least 0.24, half of the pages
of one picture left out, pairs of 32 tokens, batches of 32 pages and 64 pairs a GPU (64 GPUs), AdamW at 1e-4, weight decay 0.1 on the gated blocks, 1,875 steps
of warm-up. Not known: how long each size was trained (60 million pages, 120 million pairs in all).

Your data: FOLDER/mmc4-*.tar (data/interleaved_source.py reads MMC4's style) and FOLDER/laion-*.tar; `language` and `vision` are directories in the Hugging Face
layout, `tokenizer` the language model's.

Launch:   python -m vlm_jax.train --config configs/flamingo/openflamingo_9b.py:data=FOLDER,tokenizer=DIR,language=DIR,vision=DIR --workdir gs://BUCKET/run
Expected: COCO, 32 shots, CIDEr 99.5; VQAv2 53.3 (quoted, table 4). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/flamingo/openflamingo_9b.py:variant=test --workdir runs/openflamingo_test
"""
import ml_collections as ml

from vlm_jax.configs.common import clip_pictures
from vlm_jax.configs.flamingo.recipe import published_arg, recipe

PAGES, BATCH = 60_000_000, 2_048


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,data=FOLDER,tokenizer=...,language=...,vision=...,topology=v5e-256,layout=auto"."""
    arg = published_arg(arg)
    pages = dict(name="interleaved", path=f"{arg.data}/mmc4-*.tar", max_images=6, min_similarity=0.24, min_images=1, one_image=0.5)
    pairs = dict(name="image_text_order", source=dict(name="tar", path=f"{arg.data}/laion-*.tar"), text_first=0.0, space=0.0)
    streams = dict(pages=dict(source=pages, batch_size=BATCH, loss_weight=1.0, format=dict(length=256, pictures=6, loss_before_first_image=False)),
                   pairs=dict(source=pairs, batch_size=2 * BATCH, loss_weight=0.2, format=dict(length=32, pictures=1)))
    config = ml.ConfigDict()
    config.name = "openflamingo_9b"
    recipe(config, arg, dict(name="open_flamingo", preset="openflamingo-9b"), parameters=8_100_000_000, topology="v5e-256", streams=streams,
           steps=PAGES // BATCH, peak=1e-4, warmup=1_875, image=clip_pictures(224), begin=False, new_tokens=2)
    return config
