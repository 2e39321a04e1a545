"""CLIP ViT-B/32 at 224 px, on your own webdataset shards. Radford et al. 2021.

Launch:   python -m vlm_jax.train --config "configs/clip/b32.py:shards=/mnt/shards-{000000..009999}.tar,tokenizer=FOLDER" --workdir gs://BUCKET/run
          (shards are local files or on gs://, then with gcsfs installed; the quotes keep the shell from expanding the braces)
          (FOLDER holds the released vocab.json and merges.txt)
          (ImageNet's zero-shot evaluation reads its set from data_dir and readable names from class_names, docs/data.md;
          without it: --config.evaluations={})
Expected: ImageNet zero-shot top-1 63.2 with 80 templates (quoted, table 11). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/clip/b32.py:variant=test --workdir runs/clip_b32
"""
from vlm_jax.configs.clip.recipe import pairs
from vlm_jax.configs.common import published_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,shards=...,tokenizer=...,data_dir=...,class_names=FILE,templates=...,topology=v5e-256,layout=auto"."""
    arg = published_arg(arg, shards="pairs-{000000..000999}.tar", tokenizer="clip_tokenizer")
    return pairs("clip_b32", "b32-224", size=224, peak=5e-4, parameters=151_277_313, arg=arg)
