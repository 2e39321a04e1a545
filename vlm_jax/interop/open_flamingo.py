"""OpenFlamingo of three parts: its state dict as safetensors, and the directories of the language model and of CLIP that it was trained on."""
from collections.abc import Mapping, Sequence
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.data.processor import Processor
from vlm_jax.data.tokenizers import load_tokenizer
from vlm_jax.encoders.vit import Vit
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop import processors, table
from vlm_jax.interop.abstract import abstract_params
from vlm_jax.interop.directory import Imported, build, open_directory, prefix_of
from vlm_jax.interop.families import clip, open_flamingo
from vlm_jax.interop.safetensors import open_file, open_folder
from vlm_jax.sharding.rules import parameter_shardings

UNREAD = table.Ignored(r"text_model\..*|(text|visual)_projection\..*|logit_scale")    # of a whole CLIP its image tower is read


def load_open_flamingo(path: str | os.PathLike, language: str | os.PathLike, vision: str | os.PathLike, dtype: str | None = None, mesh: Any = None,
                       sharding: Sequence[tuple[str, str]] | None = None, compute: str | None = None, head_dim: int = open_flamingo.HEAD_DIM,
                       new_tokens: int = 2) -> Imported:
    """Loads an OpenFlamingo.

    The table of tokens of the file has the tokenizer's tokens and behind them the new ones, <|endofchunk|>, <image> and perhaps <PAD>, which become
    `language/new_embedding` (and, of a head of its own, `new_head`); rows beyond the tokenizer's, with which some language models fill up their table, are
    dropped, as they were when the model was made. Where the file has no rows for the new tokens, each gets the mean of all, whose logit is never the largest.

    Args:
      path: the state dict's file, or a folder of several and an index.
      language, vision: directories in the Hugging Face layout: of a language model of this library, and of CLIP (whole, or its image tower).
      dtype, mesh, sharding, compute: see `load_directory`.
      head_dim: of the attention of resampler and gated blocks.
      new_tokens: how many new tokens there are, where the language model's folder has no tokenizer to tell.
    Raises:
      CheckpointError: if a file is damaged, or the three do not belong together.
      ConfigError: for directories of other models.
    """
    path, language, vision = (os.path.expanduser(os.fspath(item)) for item in (path, language, vision))
    trained = open_flamingo.TrainedParts(open_folder(path) if os.path.isdir(path) else open_file(path))
    decoder, family, text_settings, config, text_source = open_directory(language, dtype, compute)
    tower, image_settings, image_source = _image_tower(vision, dtype, compute)
    if text_settings.pop("name") != "decoder":
        raise ConfigError(f"{language}: this is no language model of the kind that OpenFlamingo extends; give the directory of MPT, GPT-NeoX, OPT or Llama.")
    tokenizer = load_tokenizer({"path": language}) if _has_tokenizer(language) else None
    old, new = _vocabulary(trained, decoder, None if tokenizer is None else tokenizer.vocab_size, new_tokens)
    made = open_flamingo.to_settings(trained, decoder.depth, head_dim)
    settings = {"name": "open_flamingo", "image": image_settings, "language": {**text_settings, "vocab_size": old, "new_tokens": new}, **made}
    model = build(settings, dtype, compute)
    shapes = abstract_params(model)
    text_shapes = abstract_params(decoder)
    whole = {"image": abstract_params(tower), "language": text_shapes, "resampler": shapes["resampler"], "gated": shapes["gated"]}
    shardings = parameter_shardings(mesh, whole, sharding) if mesh is not None else dict.fromkeys(whole)

    params = {"image": table.read([*clip.vision_rows("", tower), clip.BUFFERS, UNREAD], image_source, whole["image"], shardings["image"], dtype,
                                  prefix="vision_model."),
              "language": table.read(family.rows(decoder), text_source, text_shapes, shardings["language"], dtype, prefix=prefix_of(family, decoder),
                                     renames=family.renames)}
    own = {name: whole[name] for name in ("resampler", "gated")}
    tables = [table.Ignored("embedding|head")]
    params |= table.read([*open_flamingo.rows(made), *tables], trained, own, None if mesh is None else {name: shardings[name] for name in own}, dtype)
    params["language"] = _with_new_tokens(params["language"], trained, decoder.tied, old, new, dtype)
    processor = None if tokenizer is None else _processor(language, vision, model, new, config)
    return Imported(model, params, processor, {"model": settings}, {})


def _image_tower(folder: str, dtype: str | None, compute: str | None) -> tuple[Vit, dict[str, Any], Any]:
    """(the tower without projection, its settings, where its tensors are) of a directory of CLIP."""
    _, _, settings, config, source = open_directory(folder, dtype, compute)
    if not str(config["model_type"]).startswith("clip") or settings["name"] == "text":
        raise ConfigError(f"{folder}: its model_type is {config['model_type']!a:.40}; OpenFlamingo reads pictures by CLIP: give its directory.")
    image = {key: value for key, value in settings.get("image", settings).items() if key not in ("name", "projection", "embed_dim")}
    return build({"name": "vit", **image}, dtype, compute), image, source


def _has_tokenizer(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in processors.VOCABULARIES)


def _vocabulary(trained: open_flamingo.TrainedParts, decoder: Any, known: int | None, new: int) -> tuple[int, int]:
    """(tokens of the language model, new tokens)."""
    if "embedding" not in trained.names():
        old = decoder.vocab_size if known is None else known
    else:
        rows, width = trained.shape("embedding")
        if width != decoder.width:
            raise CheckpointError(f"{trained.where}: its table of tokens is {width} wide, the language model {decoder.width}; use the one it was trained with.")
        old = rows - new if known is None else known
        new = rows - old
    if not 2 <= new <= len(open_flamingo.NEW_TOKENS) or not 0 < old <= decoder.vocab_size:
        raise CheckpointError(f"{trained.where}: its table has {old + new} tokens, of which the tokenizer knows {old} and the language model "
                              f"{decoder.vocab_size}; two or three must be new: use the directory of the language model it was trained with.")
    return old, new


def _with_new_tokens(language: Mapping[str, Any], trained: open_flamingo.TrainedParts, tied: bool, old: int, new: int, dtype: str | None) -> dict[str, Any]:
    """The parameters of the language model with rows for the new tokens and without those that no token has."""
    def rows(name: str, table: Any) -> tuple[Any, Any]:
        """A table [tokens, width] as (old rows, new rows)."""
        if name not in trained.names():
            mean = table[:old].astype(jnp.float32).mean(0, keepdims=True).astype(table.dtype)
            return table[:old], jnp.repeat(mean, new, axis=0)
        kind = trained.dtype(name) if dtype is None else np.dtype(dtype)
        return tuple(jnp.asarray(trained.read(name, part)).astype(kind) for part in (slice(0, old), slice(old, old + new)))

    embedding, further = rows("embedding", language["token_embedding"])
    result = {**language, "token_embedding": embedding, "new_embedding": further}
    if not tied:
        kernel, added = rows("head", language["head"]["kernel"].T)
        result |= {"head": {**language["head"], "kernel": kernel.T}, "new_head": {"kernel": added.T}}
    return result


def _processor(language: str, vision: str, model: Any, new: int, config: Mapping[str, Any]) -> Processor | None:
    """The tokenizer of the language model with the new tokens, and the image operations of CLIP; only a Llama begins its texts with a mark."""
    image = processors.image_operations(vision)
    if not image:
        return None
    added = list(open_flamingo.NEW_TOKENS[:new])
    tokenizer = load_tokenizer({"path": language, "added": added, "special": added})
    text = [["tokenize", {"tokenizer": tokenizer.to_dict(), "length": 8, "pad_id": tokenizer.token_id(added[-1]) if new == 3 else tokenizer.eos_id or 0}]]
    return Processor(image=image, text=text, format={**processors.documents_format(model, tokenizer)[1], "begin": config["model_type"] == "llama"})
