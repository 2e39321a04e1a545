"""IDEFICS-80B: OpenCLIP H/14 and LLaMA, frozen, on OBELICS and pairs. Laurençon et al., "OBELICS" (2023), section 5 and appendix.

Norms of queries and keys in the new blocks, pages of 1,024 tokens; two new tokens, the picture's mark and one around it. From memory (unsure): 200,000 steps,
Adam 0.9 and 0.999, weight decay 0.1, a z-loss of 1e-3, 5e-5 with linear decay, 2,000 steps of warm-up. Batch sizes and shares of the sets are chosen here.

Your data: FOLDER/obelics-*.tar (data/interleaved_source.py reads OBELICS's style) and FOLDER/pairs-*.tar; `language` and `vision` are directories in the
Hugging Face layout.

Launch:   python -m vlm_jax.train --config configs/flamingo/idefics_80b.py:data=FOLDER,tokenizer=DIR,language=DIR,vision=DIR --workdir gs://BUCKET/run
Expected: COCO, 32 shots, CIDEr 114.1; VQAv2 65.9 (quoted, the release's card). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/flamingo/idefics_80b.py:variant=test --workdir runs/idefics_test
"""
import ml_collections as ml

from vlm_jax.configs.flamingo.recipe import MARK_IDEFICS, PICTURES_IDEFICS, idefics_streams, published_arg, recipe


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,data=FOLDER,tokenizer=...,language=...,vision=...,topology=v5p-512,layout=auto"."""
    arg = published_arg(arg)
    config = ml.ConfigDict()
    config.name = "idefics_80b"
    recipe(config, arg, dict(name="idefics", preset="idefics-80b"), parameters=80_000_000_000, topology="v5p-512", streams=idefics_streams(arg.data),
           steps=200_000, peak=5e-5, warmup=2_000, image=PICTURES_IDEFICS, schedule="linear", z_loss=1e-3, **MARK_IDEFICS)
    return config
