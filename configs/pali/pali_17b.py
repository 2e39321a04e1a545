"""PaLI-17B in the two stages of the paper: ViT-e frozen at 224 px over one pass of the mixture, then everything at 588 px. Chen et al. 2022, sections 3.2, 3.3.

Facts: 1.566 billion examples at batch 4,096, peak 0.005, 1,000 steps of warm-up, then by the inverse square root; 10 million examples at 588 px in 10,000
steps. Not known: Adafactor's constants, the peak of the second stage (a tenth here), the wording of the prompts.

Launch:   python -m vlm_jax.train --config configs/pali/pali_17b.py:data=FOLDER,tokenizer=mt5.model --workdir gs://BUCKET/run
Expected: COCO captions, CIDEr 149.1; VQAv2 84.3; NoCaps 124.4 (quoted). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/pali/pali_17b.py:variant=test --workdir runs/pali_17b_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out
from vlm_jax.configs.pali.recipe import pretraining
from vlm_jax.training.config import parse_arg

EXAMPLES, BATCH = 1_566_000_000, 4_096


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,data=FOLDER,tokenizer=...,topology=v5e-256,layout=auto"."""
    arg = parse_arg(arg, variant="full", data="data", tokenizer="mt5.model", topology="", layout="auto")
    config = ml.ConfigDict()
    config.name = "pali_17b"
    config.seed = 0
    pretraining(config, "pali-17b", arg.variant == "test", arg.data, arg.tokenizer, [
        dict(steps=EXAMPLES // BATCH, resolution=224, batch_size=BATCH, frozen=True, peak=5e-3),
        dict(steps=10_000, resolution=588, batch_size=1_024, frozen=False, peak=5e-4),
    ])
    lay_out(config, arg, "v5e-256", 16_900_000_000)
    return config
