"""What the configs of models that answer in text share: text and image operations, and PaLI's recipe in stages. Chen et al. 2022, section 3."""
import ml_collections as ml

from vlm_jax.configs.common import pictures
from vlm_jax.data.objectives import PALI_MIXTURE

LOCATIONS = "<loc0000..1023>"   # PaliGemma's tokens of places


def trained_text(source: dict, vocab_size: int, added: list[str] | None = None, **settings) -> list:
    """Text operations of the small studies: SentencePiece trained on prompts and answers of `source`, followed by tokens of our own."""
    return [["lowercase", {}], ["tokenize", {"tokenizer": {"train_on": source, "vocab_size": vocab_size, **settings, **({"added": added} if added else {})}}]]


def loaded_text(path: str, added: list[str] | None = None) -> list:
    """Text operations of the published models: a tokenizer file or folder, prompts and answers as they are written."""
    return [["tokenize", {"tokenizer": {"path": path, **({"added": added} if added else {})}}]]


def drawn(size: int, images: bool) -> list:
    """Image operations of the drawn worlds: white becomes 0; without `images` everything does, which is the baseline that reads text alone."""
    return [*pictures(size, -2.0, 0.0), *([] if images else [["blank", {}]])]


def tables(folder: str) -> dict:
    """PaLI's eight objectives on tables of your own, `FOLDER/OBJECTIVE.jsonl`, in the shares of the paper (data/objectives.py)."""
    return dict(name="pali_mixture", sources={objective: dict(name="table", path=f"{folder}/{objective}.jsonl") for objective in PALI_MIXTURE})


def held_out(validation: str, test: bool, every: int, **settings) -> dict:
    """The evaluations of a tuning recipe, {"held_out": at most 512 records of a table that training does not read}; none where it is not given.

    `settings` are those of the evaluator and, as `source`, further ones of the table. The test variant reads drawn shapes.
    """
    if not test and not validation:
        return {}
    table = dict(name="table", path=validation, limit=512, **settings.pop("source", {}))
    drawn = dict(name="shapes_captions", split="validation", size=32, limit=8)
    return dict(held_out=dict(evaluator="captioning", source=drawn if test else table, every=2 if test else every, max_tokens=6 if test else 64, **settings))


def small_mixture(size: int) -> dict:
    """The same on drawn shapes, with the objectives that need no writing in the pictures."""
    worlds = dict(split_caption="captions", span_corruption="captions", caption="captions", vqa="questions", question_generation="questions",
                  object_aware="captions", detection="captions")
    return dict(name="pali_mixture", sources={objective: dict(name=f"shapes_{world}", split="train", size=size) for objective, world in worlds.items()})


def pretraining(config: ml.ConfigDict, preset: str, test: bool, data: str, tokenizer: str, stages: list[dict], text_length: int = 128,
                target_length: int = 128) -> None:
    """Fills a multi-stage recipe: model, processor, and one stage for each of `stages`, dicts of steps, resolution, batch_size, frozen and peak.

    A stage's pictures have its resolution; learned positions are resampled from stage to stage. `frozen` keeps the image tower as it is.
    """
    if test:   # one program for all: the second stage has what later ones have
        stages = [dict(stage, peak=1e-3) for stage in stages[:2]]
    source = small_mixture(32) if test else tables(data)
    patch = 8 if test else 14
    words = dict(name="mixture", sources=[dict(name=f"shapes_{world}", split="train", size=32, count=500) for world in ("captions", "questions")])
    sentinels = ["<extra_id_0..9>"]
    text = trained_text(words, 384, [LOCATIONS, *sentinels]) if test else loaded_text(tokenizer, [LOCATIONS])

    def at(resolution: int) -> dict:
        patches = (resolution // patch) ** 2
        lengths = dict(length=patches + (64 if test else text_length), target_length=48 if test else target_length)
        return dict(image=pictures(resolution), text=text, format=dict(kind="encoder_decoder", image_tokens=patches, truncate_target=True, **lengths))

    sizes = [24 + 8 * number if test else stage["resolution"] for number, stage in enumerate(stages)]
    config.model = dict(name="pali", preset="test" if test else preset, image=dict(image_size=sizes[0]), **({} if test else dict(remat="full")))
    config.processor = at(sizes[0])
    config.task = dict(name="generation")
    config.dtypes = dict(params="float32", compute="float32" if test else "bfloat16", softmax="float32")
    config.stages = [dict(
        steps=2 if test else stage["steps"],
        data=dict(mixture=dict(source=source, batch_size=8 if test else stage["batch_size"], workers=0 if test else 16)),
        model=dict(image=dict(image_size=size)), processor=at(size),
        train=[*([(r"image/.*", None)] if stage["frozen"] else []), (r".*", {})],
        optimizer=dict(name="adafactor", b1=0.0, decay_cap=0.8),
        schedule=dict(name="rsqrt", peak=stage["peak"], warmup=1 if test else 1_000, timescale=1_000),
        clip=1.0,
        **({} if number == 0 else dict(init_from=dict(previous=True))),
    ) for number, (stage, size) in enumerate(zip(stages, sizes))]
    every = 2 if test else 5_000
    held_out = dict(name="shapes_captions", split="validation", size=32, limit=8) if test else dict(name="table", path=f"{data}/validation.jsonl", limit=1024)
    config.evaluations = dict(captions=dict(evaluator="captioning", source=held_out, every=every, max_tokens=6 if test else 64))
    config.checkpoint = dict(every=2 if test else 2_000, keep=2)
    config.log_every = 1 if test else 50
