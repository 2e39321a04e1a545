"""Random configurations of the families that see pictures, at odd sizes; `sample(family, seed)` is a pure function of its arguments."""
from collections.abc import Callable
import dataclasses
import random
from typing import Any

from experiments.parity import configurations
from experiments.parity.configurations import Configuration

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "relu2", "gelu_new", "swish", "gelu_fast")
EPSILONS = (1e-6, 1e-5, 1e-3)
Settings = dict[str, Any]
Sizes = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class PictureConfiguration(Configuration):
    """One model of the reference, with the pictures and texts that it reads.

    Attributes:
      sizes: of pictures of pixels one (height, width), the same for every row; of patches (rows, columns) of each row's grid.
    """
    sizes: tuple[tuple[int, int], ...]


def sample(family: str, seed: int) -> PictureConfiguration:
    """Configuration number `seed` of a family; those of equal seed modulo 4 have the same rows and padding."""
    rng = random.Random(f"{family} {seed}")
    rows, padding = [(5, "left"), (5, "right"), (1, "none"), (1, "left")][seed % 4]
    architecture, config_class, draw = FAMILIES[family]
    settings, sizes = draw(rng, rows)
    limit = settings.get("text_config", {}).get("max_position_embeddings", 64)
    length = limit if rng.random() < 0.5 else rng.randint(1, min(limit, 11))
    return PictureConfiguration(family, architecture, config_class, settings, rows, length, rng.randint(3, 11), padding, seed, tuple(sizes))


def _tower(rng: random.Random) -> Settings:
    """A tower of 1 to 4 layers."""
    heads = rng.choice([1, 2, 3, 5, 7])
    return {"hidden_size": heads * rng.choice([4, 5, 6, 8, 11]), "num_attention_heads": heads, "intermediate_size": rng.randint(9, 61),
            "num_hidden_layers": rng.randint(1, 4), "hidden_act": rng.choice(ACTIVATIONS), "layer_norm_eps": rng.choice(EPSILONS)}


def _text(rng: random.Random) -> Settings:
    return _tower(rng) | {"vocab_size": rng.randrange(31, 120, 2), "max_position_embeddings": rng.randint(3, 13), "bos_token_id": 0, "eos_token_id": 1,
                          "pad_token_id": 1}


def _image(rng: random.Random) -> tuple[Settings, Sizes]:
    """A tower over square pictures, whose patches need not fill them. Half of the pictures are of another size, for which positions are interpolated."""
    patch = rng.choice([2, 3, 5, 7])

    def side() -> int:
        return patch * rng.randint(1, 5) + rng.randrange(patch)

    trained = side()
    tower = _tower(rng) | {"patch_size": patch, "image_size": trained, "num_channels": rng.choice([3, 3, 1, 4])}
    return tower, [(side(), side()) if rng.random() < 0.5 else (trained, trained)]


def _siglip(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    image, sizes = _image(rng)
    return {"vision_config": image, "text_config": _text(rng) | {"projection_size": image["hidden_size"]}}, sizes


def _clip(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    """An `eos_token_id` of 2 is that of old files, and stands for the highest id of a text."""
    image, sizes = _image(rng)
    return {"vision_config": image, "text_config": _text(rng) | {"eos_token_id": rng.choice([2, 5, 29])}, "projection_dim": rng.randint(5, 23)}, sizes


def _vit(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    """Of this family a config.json may say pictures that are not square; positions are interpolated for those of the others."""
    settings, sizes = _image(rng)
    if rng.random() < 0.4:
        settings["image_size"] = list(sizes[0])
    return settings | {"pooler_output_size": rng.choice([settings["hidden_size"], 7])}, sizes


def _vit_labels(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    settings, sizes = _image(rng)
    if rng.random() < 0.4:
        settings["image_size"] = list(sizes[0])
    return settings | {"num_labels": rng.randint(2, 9)}, sizes


def _siglip2(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    """Grids of one column are left out: what PyTorch on CPUs interpolates for them is wrong (see README.md). Those of one row are in."""
    image = _tower(rng) | {"patch_size": rng.choice([2, 3, 5]), "num_patches": rng.choice([1, 4, 9, 16, 25]), "num_channels": rng.choice([3, 3, 1])}
    return ({"vision_config": image, "text_config": _text(rng) | {"projection_size": image["hidden_size"]}},
            [(rng.randint(1, 5), rng.randint(2, 6)) for _ in range(rows)])


def _pix2struct(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    """The decoder's heads together are as wide as it is, those of the encoder need not be. Grids of one row or column are in."""
    heads, head_dim, patch = rng.choice([1, 2, 3, 5]), rng.randint(4, 9), rng.choice([2, 3, 5])
    text = {"hidden_size": heads * head_dim, "d_kv": head_dim, "num_heads": heads, "d_ff": rng.randint(9, 61), "num_layers": rng.randint(1, 4),
            "vocab_size": rng.randrange(31, 120, 2), "dense_act_fn": rng.choice(["gelu_new", "gelu", "silu", "relu"]),
            "layer_norm_epsilon": rng.choice(EPSILONS), "relative_attention_num_buckets": rng.choice([8, 10, 13, 32]),
            "relative_attention_max_distance": rng.choice([17, 40, 128]), "decoder_start_token_id": 0, "pad_token_id": 0}
    image = {"hidden_size": heads * head_dim, "patch_embed_hidden_size": patch * patch * 3, "patch_size": patch, "d_kv": rng.randint(3, 9),
             "num_attention_heads": rng.choice([1, 2, 3, 5]), "d_ff": rng.randint(9, 61), "num_hidden_layers": rng.randint(1, 4), "seq_len": 16,
             "dense_act_fn": rng.choice(["gelu_new", "gelu", "silu", "relu"]), "layer_norm_eps": rng.choice(EPSILONS)}
    return ({"text_config": text, "vision_config": image, "tie_word_embeddings": rng.random() < 0.4},
            [(rng.randint(1, 5), rng.randint(1, 6)) for _ in range(rows)])


def _paligemma(rng: random.Random, rows: int, kind: str = "gemma") -> tuple[Settings, Sizes]:
    """The text models are those of the language study, without stretched positions that the length of a text changes: the reference counts from 1."""
    text = configurations.FAMILIES[kind][2](rng)
    while text["rope_parameters"]["rope_type"] in ("dynamic", "longrope"):
        text = configurations.FAMILIES[kind][2](rng)
    tied = text.pop("tie_word_embeddings")
    image, _ = _image(rng)
    image |= {"image_size": image["patch_size"] * rng.randint(1, 3) + rng.randrange(image["patch_size"]), "num_channels": 3, "vision_use_head": False}
    width = text["hidden_size"]
    return ({"vision_config": {"model_type": "siglip_vision_model", **image}, "text_config": {"model_type": kind, **text}, "projection_dim": width,
             "hidden_size": width, "vocab_size": text["vocab_size"], "image_token_index": text["vocab_size"] - 1, "tie_word_embeddings": tied},
            [(image["image_size"],) * 2])


def _paligemma2(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    return _paligemma(rng, rows, "gemma2")


def _idefics(rng: random.Random, rows: int) -> tuple[Settings, Sizes]:
    """With and without a resampler; gates of one number or one a channel, norms of queries and keys on and off, tied heads, further tokens or none, blocks
    before every layer or every second or third. The class can run only where that divides the layers. Pictures that need interpolated positions have
    another grid than the model's: a picture that is not square, but has as many patches, has no grid of its own in ours."""
    heads, interval = rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 2, 3])
    image, sizes = _image(rng)
    while len(set(sizes[0])) > 1 and all(side // image["patch_size"] == image["image_size"] // image["patch_size"] for side in sizes[0]):
        image, sizes = _image(rng)
    image |= {"embed_dim": image.pop("hidden_size"), "num_channels": 3}
    resampled = rng.random() < 0.6
    if not resampled:
        sizes = [(image["image_size"],) * 2]
    resampler = {"resampler_n_latents": rng.randint(1, 7), "resampler_depth": rng.randint(1, 3), "resampler_n_heads": rng.choice([1, 2, 3]),
                 "resampler_head_dim": rng.randint(3, 9), "qk_layer_norms_perceiver": rng.random() < 0.5, "use_resampler": resampled}
    return {"vision_config": image, "perceiver_config": resampler, "use_resampler": resampled, "hidden_size": heads * rng.choice([4, 6, 8, 10]),
            "num_attention_heads": heads, "intermediate_size": rng.randint(9, 61), "num_hidden_layers": interval * rng.randint(1, 2),
            "cross_layer_interval": interval, "hidden_act": rng.choice(["silu", "silu", "gelu", "relu"]), "rms_norm_eps": rng.choice(EPSILONS),
            "vocab_size": rng.randrange(31, 120, 2), "additional_vocab_size": rng.choice([0, 2, 2, 3]), "alpha_type": rng.choice(["float", "vector"]),
            "alpha_initializer": rng.choice(["zeros", "ones"]), "qk_layer_norms": rng.random() < 0.5, "tie_word_embeddings": rng.random() < 0.4,
            "max_position_embeddings": 128}, sizes


FAMILIES: dict[str, tuple[str, str, Callable[[random.Random, int], tuple[Settings, Sizes]]]] = {
    "siglip": ("SiglipModel", "SiglipConfig", _siglip),
    "clip": ("CLIPModel", "CLIPConfig", _clip),
    "vit": ("ViTModel", "ViTConfig", _vit),
    "vit_labels": ("ViTForImageClassification", "ViTConfig", _vit_labels),
    "siglip2": ("Siglip2Model", "Siglip2Config", _siglip2),
    "pix2struct": ("Pix2StructForConditionalGeneration", "Pix2StructConfig", _pix2struct),
    "paligemma": ("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", _paligemma),
    "paligemma2": ("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", _paligemma2),
    "idefics": ("IdeficsForVisionText2Text", "IdeficsConfig", _idefics),
}
