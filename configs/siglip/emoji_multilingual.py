"""SigLIP on emoji named in eleven languages; three more are held out. Zhai et al. 2023, section 4.3 (mSigLIP), in two stages as in LiT (Zhai et al. 2022).

Eleven names for one picture teach the image tower nothing that one does not: it is trained with the English ones first, then locked, and the text
tower, whose steps are cheap, learns all languages against it.

Launch:   python -m vlm_jax.train --config configs/siglip/emoji_multilingual.py --workdir runs/emoji_multilingual
Try here: python -m vlm_jax.train --config configs/siglip/emoji_multilingual.py:variant=test --workdir runs/emoji_multilingual_test
Measured: held-out combinations, text to image R@1 / R@5: English 66.0 / 96.7 %, German 59.8 / 95.9 %, Japanese 60.6 / 93.8 %, the weakest of eleven (Chinese)
          56.8 / 92.9 %; one seed, 579 pictures, two AMD EPYC cores, 2026-11-21, 14 minutes.
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, pictures, retrieval, study_stage, trained_text
from vlm_jax.data.worlds.emoji_splits import HELDOUT_LANGUAGES, TRAIN_LANGUAGES
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,steps=350,text_steps=1100,topology=...,layout=auto": the steps of the two stages."""
    arg = parse_arg(arg, variant="full", steps=350, text_steps=1100, topology="", layout="auto")
    test = arg.variant == "test"
    languages = list(TRAIN_LANGUAGES)
    every_language = languages + list(HELDOUT_LANGUAGES)
    train = dict(name="emoji", split="train", languages=languages, size=72)

    config = ml.ConfigDict()
    config.name = "siglip_emoji_multilingual"
    config.seed = 0
    config.model = dict(name="siglip", preset="test" if test else "emoji", text=dict(length=28, vocab_size=8192))
    words = dict(train, limit=500) if test else train
    config.processor = dict(image=pictures(24 if test else 48, -2.0, 0.0), text=trained_text(words, vocab_size=3000 if test else 8192, length=28))
    config.task = dict(name="contrastive", loss="sigmoid")
    lay_out(config, arg, "", parameters=10_000_000)
    english = study_stage(test, arg.steps, dict(train, languages=["en"]), batch_size=256, warmup=50)
    translation = study_stage(test, arg.text_steps, train, batch_size=256, warmup=50, train=[(r"image/.*", None), (r".*", {})])
    config.stages = [english, translation]
    every = 2 if test else 10_000   # and at the end
    limit = 24 if test else None
    held_out = dict(name="emoji", split="heldout_attributes", languages=every_language, size=72, limit=limit)
    config.evaluations = dict(heldout_attributes=retrieval(held_out, every, languages=every_language))
    config.checkpoint = dict(every=2 if test else 350, keep=2)
    config.log_every = 1 if test else 10
    return config
