"""From a name and a preset to a model. The table is explicit, and a family is imported when it is asked for."""
from collections.abc import Mapping
import copy
import importlib
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.settings import call, choose, plain

# family -> (class, table of presets), each as (module, name)
FAMILIES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "vit": (("vlm_jax.encoders.vit", "Vit"), ("vlm_jax.encoders.vit_presets", "VIT")),
    "nfnet": (("vlm_jax.encoders.nfnet", "NFNet"), ("vlm_jax.encoders.nfnet_presets", "NFNET")),
    "naflex_vit": (("vlm_jax.encoders.naflex_vit", "NaflexVit"), ("vlm_jax.encoders.vit_presets", "NAFLEX")),
    "text": (("vlm_jax.encoders.text", "TextTransformer"), ("vlm_jax.encoders.vit_presets", "TEXT")),
    "siglip": (("vlm_jax.models.dual_encoder", "DualEncoder"), ("vlm_jax.models.dual_encoder_presets", "SIGLIP")),
    "siglip2": (("vlm_jax.models.dual_encoder", "DualEncoder"), ("vlm_jax.models.dual_encoder_presets", "SIGLIP2")),
    "clip": (("vlm_jax.models.dual_encoder", "DualEncoder"), ("vlm_jax.models.dual_encoder_presets", "CLIP")),
    "nfnet_contrastive": (("vlm_jax.models.dual_encoder", "DualEncoder"), ("vlm_jax.models.dual_encoder_presets", "NFNET_CONTRASTIVE")),
    "lit": (("vlm_jax.models.dual_encoder", "DualEncoder"), ("vlm_jax.models.dual_encoder_presets", "LIT")),
    "decoder": (("vlm_jax.language.decoder", "Decoder"), ("vlm_jax.language.presets", "DECODER")),
    "encoder_decoder": (("vlm_jax.language.encoder_decoder", "EncoderDecoder"), ("vlm_jax.language.presets", "ENCODER_DECODER")),
    "bert": (("vlm_jax.language.bert", "Bert"), ("vlm_jax.language.presets", "BERT")),
    "paligemma": (("vlm_jax.models.prefix_lm", "PrefixLM"), ("vlm_jax.models.prefix_lm_presets", "PALIGEMMA")),
    "frozen": (("vlm_jax.models.prefix_lm", "PrefixLM"), ("vlm_jax.models.frozen_presets", "FROZEN")),
    "flamingo": (("vlm_jax.models.cross_attention_lm", "CrossAttentionLM"), ("vlm_jax.models.cross_attention_lm_presets", "FLAMINGO")),
    "open_flamingo": (("vlm_jax.models.cross_attention_lm", "CrossAttentionLM"), ("vlm_jax.models.cross_attention_lm_presets", "OPEN_FLAMINGO")),
    "idefics": (("vlm_jax.models.cross_attention_lm", "CrossAttentionLM"), ("vlm_jax.models.cross_attention_lm_presets", "IDEFICS")),
    "pali": (("vlm_jax.models.pali", "Pali"), ("vlm_jax.models.pali_presets", "PALI")),
    "screenai": (("vlm_jax.models.pali", "Pali"), ("vlm_jax.models.pali_presets", "SCREENAI")),
    "pix2struct": (("vlm_jax.models.pix2struct", "Pix2Struct"), ("vlm_jax.models.pix2struct_presets", "PIX2STRUCT")),
}


def families() -> list[str]:
    """The names that `build` knows."""
    return sorted(FAMILIES)


def presets(name: str) -> list[str]:
    """The presets of a family.

    Raises:
      ConfigError: for an unknown family.
    """
    return list(_load(choose(FAMILIES, name, "model.name")[1]))


def settings(name: str, preset: str | None = None, **overrides: Any) -> dict[str, Any]:
    """The settings of a preset (none: of the family's class) with `overrides` merged into it, section by section, as `build` passes them to the model."""
    table = _load(choose(FAMILIES, name, "model.name")[1])
    return _merged(choose(table, preset, f'model.preset of "{name}"') if preset is not None else {}, plain(overrides), "model")


def build(name: str, preset: str | None = None, *, dtypes: Mapping[str, str] | None = None, **overrides: Any) -> Any:
    """Builds a model; nothing is computed and no parameter made.

    Args:
      name, preset: `families()` and `presets(name)`; without a preset all settings come from `overrides`.
      dtypes: the config's section `{"params", "compute", "softmax", "frozen"}`, each a dtype's name; float32 where it is silent. The last is how training
        stores what it does not train, and nothing to the model.
      overrides: settings of the model, merged into the preset: `text=dict(length=28)` changes one setting of the text tower. A `variant` replaces
        the sizes that the preset gives.
    Returns:
      an unbound Flax module.
    Raises:
      ConfigError: for an unknown family, preset or setting, or settings that do not fit each other.
    """
    made = settings(name, preset, **overrides)
    made.update(call(_dtypes, plain(dtypes or {}), "dtypes"))
    model = call(_load(FAMILIES[name][0]), _frozen(made), "model")
    model.input_shapes()   # builds the towers' settings, so that a misspelt one is found here
    return model


def _dtypes(params: str | None = None, compute: str | None = None, softmax: str | None = None, frozen: str | None = None) -> dict[str, str]:
    given = {"param_dtype": params, "dtype": compute, "softmax_dtype": softmax}
    for value in (*given.values(), frozen):
        if value not in (None, "float32", "bfloat16", "float16", "float64"):
            raise ConfigError(f'dtypes: "{value}" is not a float type; choose "float32" or "bfloat16".')
    return {key: value for key, value in given.items() if value is not None}


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    if overrides.get("variant") is not None:
        from vlm_jax.encoders.variants import variant
        for key in variant(overrides["variant"]):
            result.pop(key, None)
    for key, value in overrides.items():
        known = result.get(key)
        if isinstance(known, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{key} is a section, got {value!r}; give a dict of the settings to change.")
            result[key] = _merged(known, value, f"{where}.{key}")
        else:
            result[key] = value
    return result


def _frozen(value: Any) -> Any:
    """Lists become tuples: settings of modules are hashable."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _load(target: tuple[str, str]) -> Any:
    return getattr(importlib.import_module(target[0]), target[1])
