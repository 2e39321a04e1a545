"""PaLI-3 in the stages of the paper: SigLIP G/14 frozen at 224 px, then everything at 812 and at 1,064 px. Chen et al., "PaLI-3" (2023), section 2.

Not published: mixture, optimiser and steps; these are PaLI's shares and its Adafactor (configs/pali/pali_17b.py), and steps of our choice. The sizes of its
UL2 are those of T5 1.1 XL (models/pali_presets.py).

Launch:   python -m vlm_jax.train --config configs/pali/pali3_5b_pretrain.py:data=FOLDER,tokenizer=FOLDER --workdir gs://BUCKET/run
Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/pali/pali3_5b_pretrain.py:variant=test --workdir runs/pali3_pretrain_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out
from vlm_jax.configs.pali.recipe import pretraining
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,data=FOLDER,tokenizer=...,topology=v5e-256,layout=auto"."""
    arg = parse_arg(arg, variant="full", data="data", tokenizer="ul2", topology="", layout="auto")
    config = ml.ConfigDict()
    config.name = "pali3_5b_pretrain"
    config.seed = 0
    pretraining(config, "pali-3-5b", arg.variant == "test", arg.data, arg.tokenizer, [
        dict(steps=300_000, resolution=224, batch_size=4_096, frozen=True, peak=1e-2),
        dict(steps=10_000, resolution=812, batch_size=512, frozen=False, peak=1e-3),
        dict(steps=5_000, resolution=1_064, batch_size=512, frozen=False, peak=1e-3),
    ])
    lay_out(config, arg, "v5e-256", 4_900_000_000)
    return config
