"""PaliGemma-3B, fine-tuned at one of its three resolutions. Beyer et al., "PaliGemma" (2024), sections 3 and 4; appendix J for the settings of each task.

Your data: a JSONL or CSV table whose records have `image`, `prompt` and `texts`; the tokenizer is the release's SentencePiece file, which has the location
tokens. Published weights come in through `init`: DIR, a release in the Hugging Face layout such as paligemma-3b-pt-224, or a run. `tokenizer` may be DIR, too.
`validation` is another such table, of records that `data` has not: without it nothing is evaluated, since training
records say nothing about new ones.

Launch:   python -m vlm_jax.train --config configs/paligemma/paligemma_3b.py:data=train.jsonl,validation=val.jsonl,tokenizer=DIR,init=DIR --workdir gs://BUCKET/run
Expected: COCO captions, CIDEr 141.9 at 224 px and 144.6 at 448 px (quoted, big_vision's README). Measured: not trained by us.
Try here: python -m vlm_jax.train --config configs/paligemma/paligemma_3b.py:variant=test --workdir runs/paligemma_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, pictures
from vlm_jax.configs.pali.recipe import held_out, loaded_text, trained_text
from vlm_jax.training.config import parse_arg

COUNTS = {224: 2_923_466_480, 448: 2_924_351_216, 896: 2_927_890_160}
TEXT_LENGTH = {224: 128, 448: 128, 896: 512}
PEAK, BATCH = 1e-5, 256   # COCO captions: five epochs, decay a tenth of the learning rate, warm-up over 5 %


def get_config(arg=None):
    """Returns the config; `arg` is a choice of

    "variant=full|test,resolution=224|448|896,data=...,validation=...,tokenizer=...,init=...,steps=11000,topology=v5e-16,layout=auto".
    """
    arg = parse_arg(arg, variant="full", resolution=224, data="train.jsonl", validation="",
                    tokenizer="paligemma.model", init="", steps=11_000, topology="", layout="auto")
    test = arg.variant == "test"
    size, patch = (24, 8) if test else (arg.resolution, 14)
    patches = (size // patch) ** 2
    drawn = dict(name="shapes_captions", split="train", size=32)

    config = ml.ConfigDict()
    config.name = f"paligemma_3b_{arg.resolution}"
    config.seed = 0
    config.model = dict(name="paligemma", preset="test") if test else dict(name="paligemma", preset=f"paligemma-3b-{arg.resolution}", remat="full")
    config.processor = dict(
        image=pictures(size, method="bicubic"), text=trained_text(drawn, 384, ["<bos>", "\n"]) if test else loaded_text(arg.tokenizer),
        format=dict(kind="prefix_lm", length=patches + (24 if test else TEXT_LENGTH[arg.resolution]), image_tokens=patches, begin="<bos>"))
    config.task = dict(name="generation")
    lay_out(config, arg, "v5e-16", COUNTS[arg.resolution])
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32")
    config.stages = [dict(
        steps=2 if test else arg.steps,
        data=dict(tuning=dict(source=drawn if test else dict(name="table", path=arg.data), batch_size=8 if test else BATCH, workers=0 if test else 16)),
        train=[(r".*", {})],
        optimizer=dict(name="adamw", b1=0.9, b2=0.999, weight_decay=0.1 * PEAK),
        schedule=dict(name="cosine", peak=PEAK, warmup=1 if test else arg.steps // 20),
        clip=1.0,
        **(dict(init_from=dict(workdir=arg.init)) if arg.init and not test else {}),
    )]
    config.evaluations = held_out(arg.validation, test, 2_000)
    config.checkpoint = dict(every=2 if test else 1_000, keep=2)
    config.log_every = 1 if test else 20
    return config
