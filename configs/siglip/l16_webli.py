"""SigLIP L/16 at 256 px on WebLI, or on your own webdataset shards. Zhai et al. 2023.

Launch:   python -m vlm_jax.train --config "configs/siglip/l16_webli.py:shards=/mnt/{000000..009999}.tar,tokenizer=c4_en.model" --workdir gs://BUCKET/run
          (shards are files, local or mounted as by gcsfuse; the quotes keep the shell from expanding the braces)
Expected: ImageNet zero-shot top-1 80.5 (quoted, big_vision README). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/siglip/l16_webli.py:variant=test --workdir runs/l16_webli
"""
from vlm_jax.configs.siglip.recipe import webli
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,shards=...,tokenizer=...,data_dir=...,topology=v5e-256,layout=auto"."""
    arg = parse_arg(arg, variant="full", shards="webli-{000000..000999}.tar", tokenizer="c4_en.model", data_dir="", topology="", layout="auto")
    return webli("siglip_l16_webli", "siglip", "l16-256", size=256, length=64, parameters=652_150_786, arg=arg)
