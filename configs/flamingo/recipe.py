"""What the recipes of models that read pictures by cross-attention share: interleaved documents, pairs and videos, one batch of each a step.

Alayrac et al., "Flamingo" (2022), sections 2.4, 3.1 and appendix B.1; Awadalla et al., "OpenFlamingo" (2023), section 3; Laurençon et al., "OBELICS" (2023).
"""
import ml_collections as ml

from vlm_jax.configs.common import CLIP_VALUES, lay_out, pictures
from vlm_jax.configs.pali.recipe import loaded_text
from vlm_jax.training.config import parse_arg

CHUNK_END = "<|endofchunk|>"
VOCABULARY = 384     # pieces of the tokenizer that the test variants train
MEAN = [124, 116, 104]
# Section 3.1.1: 320 pixels, the aspect ratio kept by padding with the mean colour, flips.
PICTURES_320 = [["decode", {}], ["pad_to_square", {"color": MEAN}], *pictures(320)[1:]]
# IDEFICS: squares whatever the aspect ratio; a picture's mark stands between two further tokens, and ends no chunk.
PICTURES_IDEFICS = [["decode", {}], ["resize", {"size": 224, "method": "bicubic"}], *CLIP_VALUES]
MARK_IDEFICS = dict(image_text="<fake_token_around_image><image><fake_token_around_image>", chunk_end=False, new_tokens=2)
# What the papers train, tower and language model being frozen; no weight decay but on the gated blocks (appendix B.1.2).
TRAINED = [(r"gated/.*", {}), (r"resampler/.*", {"weight_decay": 0.0}), (r"language/new_.*", {"weight_decay": 0.0}), (r".*", None)]


def published_arg(arg: str | None) -> ml.ConfigDict:
    """Reads the argument of a published recipe: variant, data (a folder), tokenizer, language and vision (weights), topology and layout."""
    return parse_arg(arg, variant="full", data="data", tokenizer="tokenizer.model", language="", vision="", topology="", layout="auto")


def published_streams(folder: str) -> dict:
    """Flamingo's four sets with their loss weights (appendix B.1.1), read from tar shards; batch sizes are chosen here.

    The paper's weights multiply sums over the tokens of a document, ours means over target tokens (`GenerationTask`), so that a page, whose tokens are many,
    weighs less beside a pair here than there; how long the documents of its sets are on average, which the translation needs, is not published.
    """
    def pairs(name: str, space: float) -> dict:
        return dict(name="image_text_order", source=dict(name="tar", path=f"{folder}/{name}-*.tar"), text_first=0.0, space=space)

    pages = dict(name="interleaved", path=f"{folder}/m3w-*.tar")
    return dict(m3w=dict(source=pages, batch_size=256, loss_weight=1.0, format=dict(length=256, pictures=5, next_image=0.5)),
                align=dict(source=pairs("align", 0.5), batch_size=512, loss_weight=0.2, format=dict(length=32, pictures=1)),
                ltip=dict(source=pairs("ltip", 0.5), batch_size=512, loss_weight=0.2, format=dict(length=64, pictures=1)),
                vtp=dict(source=dict(name="interleaved", path=f"{folder}/vtp-*.tar"), batch_size=64, loss_weight=0.03,
                         format=dict(length=32, pictures=1, frames=8)))


def idefics_streams(folder: str) -> dict:
    """Pages of OBELICS and pairs; their shares are chosen here."""
    pairs = dict(name="image_text_order", source=dict(name="tar", path=f"{folder}/pairs-*.tar"), text_first=0.0, space=0.0)
    return dict(pages=dict(source=dict(name="interleaved", path=f"{folder}/obelics-*.tar", min_images=1), batch_size=512, loss_weight=1.0,
                           format=dict(length=1024, pictures=10)),
                pairs=dict(source=pairs, batch_size=512, loss_weight=1.0, format=dict(length=64, pictures=1)))


def drawn_streams(size: int) -> dict:
    """Streams from the shapes world, of pictures and of frames, for the test variants."""
    pages = dict(name="shapes_episodes", split="train", size=size, shots=[1, 2], loss="all")
    return dict(pages=dict(source=pages, batch_size=4, loss_weight=1.0, format=dict(length=64, pictures=3, next_image=0.5)),
                videos=dict(source=dict(name="shapes_videos", split="train", size=size, frames=2), batch_size=4, loss_weight=0.03,
                            format=dict(length=32, pictures=1, frames=2)))


def recipe(config: ml.ConfigDict, arg: ml.ConfigDict, model: dict, *, parameters: int, topology: str, streams: dict, steps: int, peak: float, warmup: int,
           image: list, schedule: str = "constant", z_loss: float = 0.0, begin: str | bool = True, image_text: str = "<image>",
           chunk_end: str | bool = CHUNK_END, new_tokens: int = 1) -> None:
    """Fills a recipe of one stage.

    Args:
      model: family and preset of the full variant; the test variant takes the family's "test" and drawn streams.
      parameters: of the full model. topology: the one that it is for.
      streams: {name: dict(source, batch_size, loss_weight, format=what this stream's format has of its own)}.
      image: image operations of the full variant.
      begin, image_text, chunk_end: of the format; new_tokens: how many of their tokens are not the language model's own.
    """
    test, size = arg.variant == "test", 24
    streams = drawn_streams(size) if test else streams
    form = dict(kind="interleaved", begin="<s>" if test else begin, image_text="<image>" if test else image_text, chunk_end=CHUNK_END if test else chunk_end,
                span="random")
    added = [mark for mark in ("<fake_token_around_image>", "<image>") if mark in image_text and new_tokens == 2] + ([chunk_end] if chunk_end else [])
    words = dict(name="shapes_texts", split="train", kinds=["description", "question"], count=500)
    small = {"tokenizer": {"train_on": words, "vocab_size": VOCABULARY, "model_type": "bpe", "added": ["<s>", "<image>", CHUNK_END]}}

    config.seed = 0
    config.model = dict(name=model["name"], preset="test", language=dict(vocab_size=VOCABULARY + 2, new_tokens=1)) if test else dict(model, remat="full")
    operations = dict(image=pictures(size) if test else image, text=[["tokenize", small]] if test else loaded_text(arg.tokenizer, added))
    forms = {name: dict(form, **stream["format"]) for name, stream in streams.items()}
    config.processor = dict(operations, format=next(iter(forms.values())))
    config.task = dict(name="generation", z_loss=z_loss, stream_weights={name: stream["loss_weight"] for name, stream in streams.items()})
    lay_out(config, arg, topology, parameters)
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32", frozen="float32" if test else "bfloat16")
    weights = [dict(workdir=path, mapping=[(r"(.*)", rf"{part}/\1")]) for part, path in (("language", arg.language), ("image", arg.vision))
               if path and not test]
    config.stages = [dict(
        steps=2 if test else steps,
        data={name: dict(source=stream["source"], batch_size=stream["batch_size"], processor=dict(operations, format=forms[name]),
                         workers=0 if test else 16) for name, stream in streams.items()},
        train=TRAINED,
        optimizer=dict(name="adamw", b1=0.9, b2=0.999, weight_decay=0.1),
        schedule=dict(name=schedule, peak=peak, warmup=1 if test else warmup),
        clip=1.0,
        **(dict(init_from=weights) if weights else {}),
    )]
    drawn = dict(name="shapes_episodes", split="validation", size=size, shots=1, count=4)
    config.evaluations = dict(episodes=dict(evaluator="vqa", source=drawn, every=2, max_tokens=4)) if test else {}
    config.checkpoint = dict(every=2 if test else 1_000, keep=2)
    config.log_every = 1 if test else 20
