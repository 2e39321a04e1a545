"""SigLIP 2 B/16 at 224 px, fixed resolution: the sigmoid loss with Gemma's vocabulary. Tschannen et al. 2025.

Only the contrastive part of the recipe; its captioning decoder and self-distillation are later systems.

Launch:   python -m vlm_jax.train --config "configs/siglip/siglip2_b16.py:shards=/mnt/{000000..009999}.tar,tokenizer=gemma.model" --workdir gs://BUCKET/run
          (shards are local files or on gs://, then with gcsfs installed; the quotes keep the shell from expanding the braces)
          (ImageNet's zero-shot evaluation reads its set from data_dir and readable names from class_names, docs/data.md;
          without it: --config.evaluations={})
Expected: ImageNet zero-shot top-1 78.2, COCO R@1 text to image 52.1, image to text 68.9 (quoted, whole recipe). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/siglip/siglip2_b16.py:variant=test --workdir runs/siglip2_b16
"""
from vlm_jax.configs.common import published_arg
from vlm_jax.configs.siglip.recipe import webli


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,shards=...,tokenizer=...,data_dir=...,class_names=FILE,templates=...,topology=v5e-256,layout=auto"."""
    arg = published_arg(arg, shards="webli-{000000..000999}.tar", tokenizer="gemma.model")
    return webli("siglip2_b16", "siglip2", "b16-224", size=224, length=64, parameters=375_187_970, arg=arg, canonical=False)
