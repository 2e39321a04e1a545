"""What models that see pictures read, and what both libraries give for it."""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity.picture_configurations import PictureConfiguration
from experiments.parity.texts import shifted
from vlm_jax.interop.directory import Imported

DUAL = ("siglip", "clip", "siglip2")
CLASSIFIERS = ("vit", "vit_labels")
UNUSED = 2   # rows of `patches` that no picture fills
Arrays = dict[str, np.ndarray]


def batch(configuration: PictureConfiguration) -> Arrays:
    """Inputs of ours: `images [B, H, W, C]` (of a text model [B, N, H, W, C]) or `patches [B, P, 2 + K]`, and the texts beside them."""
    rng = np.random.default_rng(configuration.seed)
    if configuration.family == "idefics":
        return _interleaved(rng, configuration)
    family, settings = configuration.family, configuration.settings
    vision, text = settings.get("vision_config", settings), settings.get("text_config", {})
    if family in ("siglip2", "pix2struct"):
        made = {"patches": _patches(rng, configuration.sizes, vision["patch_size"] ** 2 * vision.get("num_channels", 3))}
    else:
        made = {"images": rng.normal(size=(configuration.rows, *configuration.sizes[0], vision["num_channels"])).astype(np.float32)}
    if family in CLASSIFIERS:
        return made
    if family in ("paligemma", "paligemma2"):
        return {"images": made["images"][:, None], **_prefixed(rng, configuration)}
    length = configuration.target_length if family == "pix2struct" else configuration.length
    tokens = rng.integers(3, text["vocab_size"], (configuration.rows, length))
    if family == "pix2struct":
        lengths = rng.integers(1, length + 1, (configuration.rows, 1)) if configuration.padding == "right" else length
        return {**made, "targets": tokens, "target_valid": np.broadcast_to(np.arange(length) < lengths, tokens.shape)}
    if family == "clip":   # the mark that ends a text, in most of them
        ended = rng.random(configuration.rows) < 0.8
        tokens[ended, rng.integers(0, length, configuration.rows)[ended]] = text["eos_token_id"]
    return {**made, "tokens": tokens}


def _patches(rng: np.random.Generator, grids: tuple[tuple[int, int], ...], features: int) -> np.ndarray:
    """Pictures of several shapes as rows of (row, column, pixels); the last are empty."""
    made = np.zeros((len(grids), max(rows * columns for rows, columns in grids) + UNUSED, 2 + features), np.float32)
    for picture, (rows, columns) in zip(made, grids):
        filled = picture[:rows * columns]
        filled[:, 0], filled[:, 1] = np.repeat(np.arange(rows), columns) + 1, np.tile(np.arange(columns), rows) + 1
        filled[:, 2:] = rng.normal(size=filled[:, 2:].shape)
    return made


def _prefixed(rng: np.random.Generator, configuration: PictureConfiguration) -> Arrays:
    """Texts of image tokens, a prompt and an answer, of several lengths; in a third of the configurations there is no prefix, so that all are causal."""
    settings = configuration.settings
    patches = (settings["vision_config"]["image_size"] // settings["vision_config"]["patch_size"]) ** 2
    prompts, answers = (rng.integers(0, 7, configuration.rows) for _ in range(2))
    lengths = patches + prompts + answers + 1
    total = int(lengths.max()) if configuration.padding == "none" else int(lengths.max()) + 2
    first = total - lengths if configuration.padding == "left" else np.zeros_like(lengths)
    places = np.arange(total) - first[:, None]
    tokens = rng.integers(1, settings["image_token_index"], (configuration.rows, total))
    pictured, valid = (places >= 0) & (places < patches), (places >= 0) & (places < lengths[:, None])
    prefix = (places < (patches + prompts)[:, None]) & valid & (configuration.seed % 3 != 2)
    return {"tokens": np.where(pictured, settings["image_token_index"], tokens), "slots": np.where(pictured, places, -1), "valid": valid, "prefix": prefix}


def _interleaved(rng: np.random.Generator, configuration: PictureConfiguration) -> Arrays:
    """Texts of several lengths with 1 to 4 pictures a row; a row reads none at first, then some of them in order, and every third row none at all."""
    rows, number = configuration.rows, int(rng.integers(1, 5))
    total, pictures = configuration.length + 1, rng.normal(size=(configuration.rows, number, *configuration.sizes[0], 3))
    tokens = rng.integers(0, configuration.settings["vocab_size"] + configuration.settings["additional_vocab_size"], (rows, total))
    lengths = rng.integers(1, total + 1, rows)
    lengths[0] = total
    places = np.arange(total) - (total - lengths[:, None] if configuration.padding == "left" else 0)
    valid = (places >= 0) & (places < lengths[:, None]) if configuration.padding != "none" else np.ones(tokens.shape, bool)
    index = np.minimum(np.cumsum(rng.random(tokens.shape) < 0.3, axis=1), number) - 1
    index[2::3] = -1
    return {"tokens": tokens, "valid": valid, "media_index": np.where(valid, index, -1), "images": pictures.astype(np.float32)}


def interleaved_arguments(model: Any, configuration: PictureConfiguration, inputs: Arrays) -> dict[str, Any]:
    """What the reference reads of interleaved documents."""
    import torch
    number = inputs["images"].shape[1]
    return {"input_ids": torch.from_numpy(inputs["tokens"]), "attention_mask": torch.from_numpy(inputs["valid"]).long(),
            "pixel_values": torch.from_numpy(inputs["images"]).permute(0, 1, 4, 2, 3).contiguous().to(model.dtype),
            "image_attention_mask": torch.from_numpy((inputs["media_index"][..., None] == np.arange(number)).astype(np.int64)),
            "interpolate_pos_encoding": list(configuration.sizes[0]) != [configuration.settings["vision_config"]["image_size"]] * 2}


def run_reference(model: Any, configuration: PictureConfiguration, inputs: Arrays) -> tuple[np.ndarray, ...]:
    """What the reference gives: of two towers the embeddings of pictures and texts and its scale and bias, of a ViT its pooled state or logits, of text
    models the logits that are not padding."""
    import torch
    family = configuration.family
    if family == "idefics":
        with torch.no_grad():
            return (model(**interleaved_arguments(model, configuration, inputs)).logits.float().numpy()[inputs["valid"]],)
    arrays = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    if "images" in inputs:
        images = arrays["images"].reshape(-1, *arrays["images"].shape[-3:]).permute(0, 3, 1, 2).contiguous()
        arguments: dict[str, Any] = {"pixel_values": images.to(model.dtype)}
        trained = configuration.settings.get("vision_config", configuration.settings)["image_size"]
        if list(configuration.sizes[0]) != ([trained] * 2 if isinstance(trained, int) else trained):
            arguments["interpolate_pos_encoding"] = True
    elif family == "siglip2":
        arguments = {"pixel_values": arrays["patches"][..., 2:].to(model.dtype), "pixel_attention_mask": (arrays["patches"][..., 0] > 0).long(),
                     "spatial_shapes": torch.tensor(configuration.sizes)}
    else:
        arguments = {"flattened_patches": arrays["patches"].to(model.dtype), "attention_mask": (arrays["patches"][..., 0] > 0).long()}
    valid = inputs.get("valid")
    if family == "pix2struct":
        valid = shifted(inputs["target_valid"], True)
        arguments |= {"decoder_input_ids": torch.from_numpy(shifted(inputs["targets"], 0)), "decoder_attention_mask": torch.from_numpy(valid).long()}
    elif "tokens" in inputs:
        arguments["input_ids"] = arrays["tokens"]
    if "prefix" in inputs:
        arguments |= {"attention_mask": arrays["valid"].long(), "token_type_ids": (~arrays["prefix"] & arrays["valid"]).long()}
    with torch.no_grad():
        out = model(**arguments)
    if family in DUAL:
        return (out.image_embeds.float().numpy(), out.text_embeds.float().numpy(),
                *(getattr(model, name).detach().float().numpy().reshape(()) for name in ("logit_scale", "logit_bias") if hasattr(model, name)))
    if family in CLASSIFIERS:
        return ((out.pooler_output if family == "vit" else out.logits).float().numpy(),)
    return (out.logits.float().numpy()[valid],)


def run_ours(loaded: Imported, configuration: PictureConfiguration, inputs: Arrays) -> tuple[np.ndarray, ...]:
    """What ours gives for the same inputs; layers are unrolled for odd seeds, a scan for even ones."""
    family = configuration.family
    model = loaded.model.clone(scan=configuration.seed % 2 == 0)
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    pictures = arrays.get("images", arrays.get("patches"))
    given = (pictures, arrays["tokens"]) if family in DUAL else (pictures,) if family in CLASSIFIERS else (arrays,)
    result, _ = jax.jit(lambda params, *given: model.apply({"params": params}, *given))(loaded.params, *given)
    if family in DUAL:
        scalars = tuple(loaded.params[name] for name in ("logit_scale", "logit_bias") if name in loaded.params)
        return tuple(np.asarray(array, np.float32) for array in (*result, *scalars))
    result = np.asarray(result, np.float32)
    if family in CLASSIFIERS:
        return (result,)
    return (result[inputs["valid"] if "valid" in inputs else shifted(inputs["target_valid"], True)],)
