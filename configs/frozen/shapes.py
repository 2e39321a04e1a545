"""Frozen on drawn shapes: a convolutional encoder whose two embeddings a language model reads that never moves. Tsimpoukelli et al. 2021.

Does a language model that was trained on text alone bind a new word to a new thing from one picture? Its text side is that of the small Flamingo
(configs/flamingo/shapes.py), half of the episodes with Frozen's task induction in front; then an NF-ResNet from scratch and the map to two embeddings are
trained through it.

Differs from the paper: there the encoder sees nothing but one picture and its caption, and the language model, of 7 billion parameters, does the rest. One of
less than a million does not: here every step also has a batch of episodes, whose words, concepts and pictures are not those of the evaluation.
`episodes=false` trains on captions alone. The rate is higher than 3e-4 and falls.

Stages: 1. language model, on text; 2. encoder and prefix, the language model frozen.

Launch:   python -m vlm_jax.train --config configs/frozen/shapes.py --workdir runs/frozen_shapes
Target:   one picture a word: at least three standard errors above chance; under 25 minutes on two CPU cores.
Measured: not yet.
Try here: python -m vlm_jax.train --config configs/frozen/shapes.py:variant=test --workdir runs/frozen_shapes_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out
from vlm_jax.configs.flamingo import shapes as flamingo
from vlm_jax.training.config import parse_arg

IMAGE_TOKENS = 2        # embeddings of a picture
PICTURES = 6            # of an episode in training: five examples and the query


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,language=1200,steps=1000,episodes=true,topology=...,layout=auto"."""
    arg = parse_arg(arg, variant="full", language=1200, steps=1000, episodes=True, topology="", layout="auto")
    test = arg.variant == "test"
    base = flamingo.get_config(f"variant={arg.variant},language={arg.language}")
    size, batch, pictures = (24, 4, 3) if test else (32, 64, PICTURES)
    text = base.processor["text"]
    # Pictures have no mark, and nothing ends a chunk: what the language model does not know does not come up.
    form = dict(kind="interleaved", span="start", begin="<s>", image_text=False, chunk_end=False)

    def read(length: int, pictures: int) -> dict:
        return dict(image=base.processor["image"] if pictures else [], text=text,
                    format=dict(form, length=length, pictures=pictures, image_tokens=IMAGE_TOKENS if pictures else 0))

    def stage(steps: int, warmup: int, peak: float, **settings) -> dict:
        return dict(dict(steps=2 if test else steps, optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=0.0),
                         schedule=dict(name="cosine", peak=peak, warmup=1 if test else warmup), clip=1.0), **settings)

    config = ml.ConfigDict()
    config.name = "frozen_shapes"
    config.seed = 0
    config.model = dict(name="frozen", preset="test" if test else "shapes", language=dict(vocab_size=flamingo.VOCABULARY + 3))
    config.processor = read(72, pictures)
    config.task = dict(name="generation")
    lay_out(config, arg, "", parameters=10_000_000)

    texts = base.stages[1]["data"]["short"]["source"]
    induced = dict(texts, seed=1, episodes=dict(texts["episodes"], induction=True))
    language = stage(arg.language, 100, 2e-3, train=[(r"language/.*", {}), (r".*", None)], data=dict(texts=dict(
        source=dict(name="mixture", sources=[texts, induced]), batch_size=batch, processor=read(112, 0))))

    captions = dict(name="image_text_order", source=dict(name="shapes", split="train", size=size, captions="detailed"), text_first=0.0, space=0.0)
    episodes = dict(name="shapes_episodes", size=size, kinds=["binding"], induction=True)
    streams = dict(captions=dict(source=captions, batch_size=batch, processor=read(16, 1)))
    if arg.episodes:
        shown = dict(episodes, split="train", shots=[1, pictures - 1], ways=2, levels=["pair", "color", "shape"], bank=None if test else 32)
        streams["episodes"] = dict(source=shown, batch_size=batch, processor=read(72, pictures))
    frozen = stage(arg.steps, 100, 1e-3, init_from=dict(previous=True), train=[(r"(image|projection)/.*", {}), (r".*", None)], data=streams)
    config.stages = [language, frozen]
    config.evaluations = dict(binding=dict(   # at the end of the last stage: the first one has seen no picture
        evaluator="few_shot", source=dict(episodes, split="validation", shots=2, ways=2, levels=["pair"], count=4 if test else 500),
        shots=[2], every=4 if test else 10_000))
    config.checkpoint = dict(every=2 if test else 250, keep=2)
    config.log_every = 1 if test else 20
    return config
