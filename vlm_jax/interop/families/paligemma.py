"""PaliGemmaForConditionalGeneration of transformers: SigLIP's tower, one projection, and Gemma 1 or 2."""
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import Section
from vlm_jax.interop.families import Family, llama, parts
from vlm_jax.interop.table import Ignored, Row, Rows, Tied

TEXT_TYPES = ("gemma", "gemma2")
IMAGE_TOKEN = 256_000   # the first id after Gemma's own vocabulary


def nested(rows: Sequence[Row | Tied | Ignored], theirs: str, ours: str) -> Rows:
    """The table of a part as a part of the table of the whole: `theirs` and `ours` are put in front of names."""
    def put(prefix: str, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)

    def moved(row: Row | Tied | Ignored) -> Row | Tied | Ignored:
        if isinstance(row, Row):
            return dataclasses.replace(row, theirs=put(theirs, row.theirs), ours=put(ours, row.ours))
        if isinstance(row, Tied):
            return Tied(theirs + row.theirs, theirs + row.of)
        return Ignored(theirs.replace(".", r"\.") + row.pattern)
    return [moved(row) for row in rows]


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `PrefixLM`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = Section(config)
    section.text("model_type", among=("paligemma",))
    text = dict(section.section("text_config").values)
    Section(text, f"{section.where}.text_config").text("model_type", among=TEXT_TYPES)
    # The prefix whose tokens see each other is data of ours (inputs["prefix"]); the class sets this flag for both generations.
    text.pop("use_bidirectional_attention", None)
    text["tie_word_embeddings"] = section.flag("tie_word_embeddings", True)
    language = {name: value for name, value in llama.to_settings(text).items() if name != "name"}
    if section.integer("projection_dim", language["width"]) != language["width"]:
        raise ConfigError(f"{section.where}.projection_dim: {section.values['projection_dim']} is not the width of the text model, {language['width']}; use "
                          "config.json of one release.")
    vision = section.section("vision_config")
    vision.text("model_type", "siglip_vision_model", among=("siglip_vision_model",))
    image = {**parts.tower_settings(vision), **parts.image_settings(vision, patch_size=14), "pool": "none"}
    return {"name": "paligemma", "image": image, "language": language}


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a `PrefixLM`.

    Raises:
      ConfigError: naming a setting that the class does not have.
    """
    tower, decoder = model.parts()
    text = llama.to_config(decoder)
    if text["model_type"] not in TEXT_TYPES:
        raise ConfigError(f"a model whose decoder is of the kind {text['model_type']} cannot be written as paligemma, which has {' or '.join(TEXT_TYPES)}.")
    parts.expect("PaliGemmaForConditionalGeneration", vars(tower), dict(pool="none", positions="learned", patch_bias=True, norm_before=False, projection=None))
    vision = {"model_type": "siglip_vision_model", **parts.tower_config(tower), **parts.image_config(tower), "projection_dim": decoder.width,
              "vision_use_head": False}
    if len(set(tower.grid())) > 1:
        raise ConfigError(f"model.image.image_size: a grid of {tower.grid()} patches cannot be written as paligemma, which has squares.")
    text["use_bidirectional_attention"] = True
    text["num_image_tokens"] = model.image_tokens()
    return {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"], "image_token_index": min(IMAGE_TOKEN, decoder.vocab_size - 1),
            "projection_dim": decoder.width, "hidden_size": decoder.width, "vocab_size": decoder.vocab_size, "tie_word_embeddings": decoder.tied,
            "text_config": text, "vision_config": vision}


def rows(model: Any) -> Rows:
    """The weight table."""
    tower, decoder = model.parts()
    stem = "vision_tower.embeddings"
    return [*parts.conv_stem(f"{stem}.patch_embedding", "image/patch_embedding"), Row(f"{stem}.position_embedding.weight", "image/position_embedding"),
            *parts.clip_layers("vision_tower.encoder", "image", tower.num_heads), *parts.norm("vision_tower.post_layernorm", "image/norm"),
            *parts.dense("multi_modal_projector.linear", "projection"), *nested(llama.rows(decoder), "language_model.", "language/"),
            Ignored(r"vision_tower\.(embeddings\.position_ids|head\..*)")]   # a buffer, and a pooling that the class does not read


# Names of the releases, and those that the modules themselves have, become what the class writes.
FAMILY = Family(("paligemma",), to_settings, to_config, rows, renames=(
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."), (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head.")))
