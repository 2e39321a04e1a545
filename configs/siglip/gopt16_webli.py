"""SigLIP 2 g-opt/16 at 256 px on WebLI, or on your own webdataset shards: an image tower of 1.1 B parameters with a So400m text tower. Tschannen et al. 2025.

Only the contrastive part of the recipe; its captioning decoder and self-distillation are later systems.

Launch:   python -m vlm_jax.train --config "configs/siglip/gopt16_webli.py:shards=/mnt/{000000..009999}.tar,tokenizer=gemma.model" --workdir gs://BUCKET/run
          (shards are local files or on gs://, then with gcsfs installed; the quotes keep the shell from expanding the braces)
          (ImageNet's zero-shot evaluation reads its set from data_dir and readable names from class_names, docs/data.md;
          without it: --config.evaluations={})
Expected: ImageNet zero-shot top-1 85.0, COCO R@1 text to image 56.1, image to text 72.8 (quoted, whole recipe, 384 px). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/siglip/gopt16_webli.py:variant=test --workdir runs/gopt16_webli
"""
from vlm_jax.configs.common import published_arg
from vlm_jax.configs.siglip.recipe import webli


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,shards=...,tokenizer=...,data_dir=...,class_names=FILE,templates=...,topology=v5e-256,layout=auto"."""
    arg = published_arg(arg, shards="webli-{000000..000999}.tar", tokenizer="gemma.model")
    config = webli("siglip2_gopt16_webli", "siglip2", "g-opt16-256", size=256, length=64, parameters=1_871_393_906, arg=arg, canonical=False)
    if arg.variant != "test":
        # What 40 blocks keep as their inputs, in float32, is 8 GiB a chip for 128 pairs: half of it at a time (gradient caching, losses/cached.py).
        config.stages[0]["accumulate"] = dict(micro_batches=2, cached=True)
    return config
