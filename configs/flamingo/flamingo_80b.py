"""Flamingo-80B: interleaved pages, two sets of pairs and videos, one batch of each a step. Alayrac et al. 2022, section 2.4, table 5, appendix B.1.

Frozen: NFNet-F6 (trained contrastively before: `vision`) and the language model (`language`); trained: resampler, gated cross-attention, the mark of a
chunk's end. Facts: loss weights 1.0, 0.2, 0.2 and 0.03, 256 tokens and five pictures of a page, 32 and 64 tokens of pairs, eight frames, AdamW at 1e-4 after
5,000 steps of warm-up, 500,000 steps. Not known: batch sizes (chosen here). Left out: colour augmentation.

Your data: FOLDER/m3w-*.tar (interleaved documents, data/interleaved_source.py), FOLDER/align-*.tar and FOLDER/ltip-*.tar (pairs), FOLDER/vtp-*.tar (frames and
texts).

Launch:   python -m vlm_jax.train --config configs/flamingo/flamingo_80b.py:data=FOLDER,tokenizer=FILE,language=DIR,vision=RUN --workdir gs://BUCKET/run
Expected: COCO, 32 shots, CIDEr 113.8; VQAv2 67.6 (quoted, table 1). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/flamingo/flamingo_80b.py:variant=test --workdir runs/flamingo_80b_test
"""
import ml_collections as ml

from vlm_jax.configs.flamingo.recipe import PICTURES_320, published_arg, published_streams, recipe


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,data=FOLDER,tokenizer=...,language=...,vision=...,topology=v5p-512,layout=auto"."""
    arg = published_arg(arg)
    config = ml.ConfigDict()
    config.name = "flamingo_80b"
    recipe(config, arg, dict(name="flamingo", preset="flamingo-80b"), parameters=80_000_000_000, topology="v5p-512",
           streams=published_streams(arg.data), steps=500_000, peak=1e-4, warmup=5_000, image=PICTURES_320)
    return config
