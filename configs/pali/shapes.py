"""A small PaLI on drawn shapes: captions, questions and boxes by one model, "image + text -> text". Chen et al. 2022, section 3.

Does it name, answer and find pairs of colour and shape that it never saw together? As in the paper an image tower that was trained contrastively comes
first; here it goes on learning. `images=false` trains the baseline that reads the text alone.

Launch:   python -m vlm_jax.train --config configs/pali/shapes.py --workdir runs/pali_shapes
Target:   on held-out pairs, answers above 90 %, captions word for word above 90 %, boxes at IoU 0.5 above 80 %, under 15 minutes on two CPU cores.
Measured: 78 %, 85 % and 74 % (one seed; 16 min 26 s on two cores that did other work; experiments/pali_shapes).
Try here: python -m vlm_jax.train --config configs/pali/shapes.py:variant=test --workdir runs/pali_shapes_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, study_stage, trained_text as padded_text
from vlm_jax.configs.pali.recipe import LOCATIONS, drawn, trained_text
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,contrastive=800,steps=2000,images=true,topology=...,layout=auto"."""
    arg = parse_arg(arg, variant="full", contrastive=800, steps=2000, images=True, topology="", layout="auto")
    test = arg.variant == "test"
    size, patch = (24, 8) if test else (48, 12)

    def world(task: str, split: str = "train", **settings) -> dict:
        return dict(name=f"shapes_{task}", split=split, size=size, **settings)

    tasks = dict(captions=world("captions"), questions=world("questions", objects=[1, 2]), boxes=world("boxes", objects=[1, 2]))
    words = dict(name="mixture", sources={name: dict(source, count=1000) for name, source in tasks.items()})

    config = ml.ConfigDict()
    config.name = "pali_shapes"
    config.seed = 0
    config.model = dict(name="pali", preset="test" if test else "shapes")
    config.processor = dict(
        image=drawn(size, arg.images), text=trained_text(words, 448, [LOCATIONS], model_type="bpe"),
        format=dict(kind="encoder_decoder", length=(size // patch) ** 2 + (20 if test else 12), target_length=8, image_tokens=(size // patch) ** 2))
    config.task = dict(name="generation")
    lay_out(config, arg, "", parameters=10_000_000)
    seen = {name: dict(name="shapes", split="train", size=size, objects=objects) for name, objects in (("single", 1), ("several", [1, 2]))}
    contrastive = study_stage(
        test, arg.contrastive, dict(name="mixture", sources=seen), batch_size=128, warmup=50,
        model=dict(name="siglip", preset="test" if test else "shapes", image=dict(patch_size=patch)),
        processor=dict(text=padded_text(dict(seen["several"], limit=1000), vocab_size=300, length=16), format=None),
        task=dict(name="contrastive", loss="sigmoid"))
    config.stages = [contrastive, study_stage(
        test, arg.steps, dict(name="mixture", sources=tasks, weights=dict(captions=1, questions=2, boxes=1)), batch_size=128, warmup=100, stream="tasks",
        init_from=dict(previous=True, mapping=[(r"(image/(?!pooling).*)", r"\1")]))]
    every = 4 if test else 10_000   # the end of the last stage: the first one cannot answer
    limit = 12 if test else 500
    config.evaluations = dict(
        captions=dict(evaluator="captioning", source=world("captions", "heldout_pairs", count=limit), every=every),
        questions=dict(evaluator="vqa", source=world("questions", "heldout_pairs", objects=[1, 2], count=limit), every=every),
        boxes=dict(evaluator="grounding", source=world("boxes", "heldout_pairs", objects=[1, 2], count=limit), every=every),
    )
    config.checkpoint = dict(every=2 if test else 400, keep=2)
    config.log_every = 1 if test else 20
    return config
