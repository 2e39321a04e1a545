"""The recipe of the released CLIP models, shared by the configs named after them. Radford et al. 2021, section 2.5 and appendix F.

Facts: 400 million pairs, 32 epochs, batch 32,768, AdamW with decay 0.2 (not on gains and biases), beta2 0.98, eps 1e-6 for ViT, 2,000 steps of
warm-up, cosine to 0; a random square crop is the only augmentation; the temperature starts at 0.07 and exp(t) is clipped at 100.
"""
import ml_collections as ml

from vlm_jax.configs.common import CLIP_VALUES, clip_pictures, imagenet, lay_out, zero_shot

BATCH = 32_768
STEPS = 400_000_000 * 32 // BATCH


def pairs(name: str, preset: str, size: int, peak: float, parameters: int, arg, *, topology: str = "v5e-256") -> ml.ConfigDict:
    """Returns the config of one released ViT model of that many parameters; `arg` is that of `published_arg`."""
    test = arg.variant == "test"
    config = ml.ConfigDict()
    config.name = name
    config.seed = 0
    size = 24 if test else size
    if test:   # the same program, small: tiny towers, drawn pictures, SentencePiece in place of the published byte-pair merges
        source = dict(name="shapes", split="train", size=32)
        tokenizer = {"train_on": dict(source, limit=1000), "vocab_size": 300}
        config.model = dict(name="clip", preset="test")
        length = 16
    else:
        source = dict(name="tar", path=arg.shards)
        tokenizer = {"clip": arg.tokenizer}
        config.model = dict(name="clip", preset=preset, remat="none" if "b32" in preset else "full")   # 16 GB a chip: experiments/topologies
        length = 77
    text = [["lowercase", {}], ["tokenize", {"tokenizer": tokenizer, "length": length, "bos": not test, "eos": "sticky"}]]   # ours have no bos
    crop = [["decode", {}], ["resize_shortest", {"size": size, "method": "bicubic"}], ["random_crop", {"size": size}], *CLIP_VALUES]
    config.processor = dict(image=clip_pictures(size), text=text)
    config.task = dict(name="contrastive", loss="softmax")
    lay_out(config, arg, topology, parameters)
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32")
    config.stages = [dict(
        steps=2 if test else STEPS,
        data=dict(pairs=dict(source=source, processor=dict(image=crop, text=text), batch_size=8 if test else BATCH, workers=0 if test else 16)),
        train=[(r".*", {})],
        optimizer=dict(name="adamw", b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2),
        schedule=dict(name="cosine", peak=peak, warmup=1 if test else 2_000),
        clip=None,
    )]
    drawn = dict(name="shapes", split="validation", size=32, limit=8)
    config.evaluations = dict(zero_shot=zero_shot(drawn, 2, templates=["a {}"]) if test else imagenet(arg))
    config.checkpoint = dict(every=2 if test else 5_000, keep=3)
    config.log_every = 1 if test else 50
    return config
