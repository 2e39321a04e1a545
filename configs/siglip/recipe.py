"""The recipe of the released SigLIP models, shared by the configs named after them. Zhai et al. 2023, section 4 and appendix.

Facts: 40 billion examples at batch 32,768, learning rate 1e-3, decay 1e-4, ScalingViT-Adafactor with beta2 0.95, warm-up then cosine to 0;
text lower-cased, C4 SentencePiece of 32,000 entries, pictures resized to a square in [-1, 1].
"""
import ml_collections as ml

from vlm_jax.configs.common import imagenet, lay_out, loaded_text, pictures, zero_shot

BATCH = 32_768
STEPS = 40_000_000_000 // BATCH
WARMUP = 200_000_000 // BATCH   # stated for SigLiT, the locked towers; taken over here


def webli(name: str, family: str, preset: str, size: int, length: int, parameters: int, arg, *, canonical: bool = True,
          topology: str = "v5e-256") -> ml.ConfigDict:
    """Returns the config of one released model of that many parameters; `arg` is that of `published_arg`."""
    test = arg.variant == "test"
    config = ml.ConfigDict()
    config.name = name
    config.seed = 0
    if test:   # the same program, small: same operations, same optimiser, tiny towers, drawn pictures
        train = dict(name="shapes", split="train", size=32)
        source = train
        config.model = dict(name=family, preset="test")
        size, length = 24, 16
        tokenizer = {"train_on": dict(train, limit=1000), "vocab_size": 300}
        text = [["canonicalize" if canonical else "lowercase", {}], ["tokenize", {"tokenizer": tokenizer, "length": length, "eos": "sticky"}]]
    else:
        source = dict(name="tar", path=arg.shards)
        config.model = dict(name=family, preset=preset, remat="full")   # 128 pairs a chip in 16 GB: experiments/topologies
        text = loaded_text(arg.tokenizer, length, canonical=canonical)
    config.processor = dict(image=pictures(size), text=text)
    config.task = dict(name="contrastive", loss="sigmoid")
    lay_out(config, arg, topology, parameters)
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32")
    config.stages = [dict(
        steps=2 if test else STEPS,
        data=dict(pairs=dict(source=source, batch_size=8 if test else BATCH, workers=0 if test else 16)),
        train=[(r".*", {})],
        optimizer=dict(name="adafactor", b1=0.9, decay_cap=0.95, weight_decay=1e-4),
        schedule=dict(name="cosine", peak=1e-3, warmup=1 if test else WARMUP),
        clip=1.0,
    )]
    drawn = dict(name="shapes", split="validation", size=32, limit=8)
    config.evaluations = dict(zero_shot=zero_shot(drawn, 2, templates=["a {}"]) if test else imagenet(arg))
    config.checkpoint = dict(every=2 if test else 5_000, keep=3)
    config.log_every = 1 if test else 50
    return config
