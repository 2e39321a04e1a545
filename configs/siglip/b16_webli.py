"""SigLIP B/16 at 224 px on WebLI, or on your own webdataset shards. Zhai et al. 2023.

Launch:   python -m vlm_jax.train --config "configs/siglip/b16_webli.py:shards=/mnt/{000000..009999}.tar,tokenizer=c4_en.model" --workdir gs://BUCKET/run
          (shards are local files or on gs://, then with gcsfs installed; the quotes keep the shell from expanding the braces)
          (ImageNet's zero-shot evaluation reads its set from data_dir and readable names from class_names, docs/data.md;
          without it: --config.evaluations={})
Expected: ImageNet zero-shot top-1 73.4 after 9B examples from scratch (quoted, section 4.5). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/siglip/b16_webli.py:variant=test --workdir runs/b16_webli
"""
from vlm_jax.configs.common import published_arg
from vlm_jax.configs.siglip.recipe import webli


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,shards=...,tokenizer=...,data_dir=...,class_names=FILE,templates=...,topology=v5e-256,layout=auto"."""
    arg = published_arg(arg, shards="webli-{000000..000999}.tar", tokenizer="c4_en.model")
    return webli("siglip_b16_webli", "siglip", "b16-224", size=224, length=64, parameters=203_155_970, arg=arg)
