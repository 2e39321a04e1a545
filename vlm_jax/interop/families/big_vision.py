"""big_vision's checkpoints (.npz): SigLIP and SigLIP 2 at fixed resolution, their image towers, PaliGemma 1 and 2. All sizes are read from the arrays.

The released code: github.com/google-research/big_vision, models/vit.py, models/proj/image_text/{two_towers,text_transformer}.py,
models/proj/paligemma/{paligemma,gemma_bv}.py. What arrays do not say about Gemma (soft caps, windows, the scale of queries) is that of the published sizes.
"""
import math
from typing import Any

import numpy as np

from vlm_jax.encoders.vit import Vit
from vlm_jax.errors import CheckpointError
from vlm_jax.interop.table import Ignored, Row, Rows, Source
from vlm_jax.interop.transforms import Transform, first_axis, scalar
from vlm_jax.language.presets import DECODER
from vlm_jax.models.prefix_lm import PrefixLM

PREFIX = "params/"
RENAMES = ((r"^opt/target/", "params/"),)
OTHERS = Ignored(r"(opt|chrono|extra|states?)/.*")
_LAYER_PARTS = ((("LayerNorm_0/scale", "norm_attention/scale"), ("LayerNorm_0/bias", "norm_attention/bias"), ("LayerNorm_1/scale", "norm_mlp/scale"),
                 ("LayerNorm_1/bias", "norm_mlp/bias"))
                + tuple((f"MultiHeadDotProductAttention_0/{part}/{kind}", f"attention/{part}/{kind}")
                        for part in ("query", "key", "value", "out") for kind in ("kernel", "bias"))
                + tuple((f"MlpBlock_0/{theirs}/{kind}", f"mlp/{ours}/{kind}")
                        for theirs, ours in (("Dense_0", "up"), ("Dense_1", "down")) for kind in ("kernel", "bias")))

# Transforms of Gemma's arrays count axes from the end, so that they serve one layer and a stack of them.
_HEADS = Transform(lambda x: np.swapaxes(x, -3, -2), lambda x: np.swapaxes(x, -3, -2))                       # [H, D, K] <-> [D, H, K]
_GATED = Transform(lambda x: (x[..., 0, :, :], x[..., 1, :, :]), lambda gate, up: np.stack([gate, up], -3))   # [2, D, M] <-> two of [D, M]


def _parts_of_heads(count: int) -> Transform:
    """[count, H, D, K] <-> `count` arrays [D, H, K]: queries, keys and values in one array, or keys and values."""
    return Transform(lambda x: tuple(_HEADS.to_ours(x[..., part, :, :, :]) for part in range(count)),
                     lambda *parts: np.stack([_HEADS.to_theirs(part) for part in parts], -4))


def to_settings(source: Source) -> dict[str, Any]:
    """The model that the arrays are of.

    Raises:
      CheckpointError: if they are not those of a SigLIP, of its image tower, or of a PaliGemma.
    """
    names = {name.removeprefix("opt/target/").removeprefix(PREFIX): name for name in source.names()}

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in names:
            raise CheckpointError(f"{source.where}: {name} is missing; SigLIP's two towers (img, txt, t, b), its image tower alone and PaliGemma (img, llm) "
                                  "can be read.")
        found = tuple(source.shape(names[name]))
        if len(found) != axes or not all(found):
            raise CheckpointError(f"{source.where}: {name} has shape {found}; {axes} axes are expected.")
        return found

    def encoder(prefix: str) -> dict[str, int]:
        stacked = f"{prefix}/encoderblock/MlpBlock_0/Dense_0/kernel" in names
        block = f"{prefix}/encoderblock" if stacked else f"{prefix}/encoderblock_0"
        depth = (shape(f"{block}/MlpBlock_0/Dense_0/kernel", 3)[0] if stacked
                 else len({name for name in names if name.startswith(f"{prefix}/encoderblock_") and name.endswith("/MlpBlock_0/Dense_0/kernel")}))
        width, mlp_dim = shape(f"{block}/MlpBlock_0/Dense_0/kernel", 2 + stacked)[-2:]
        heads = shape(f"{block}/MultiHeadDotProductAttention_0/query/kernel", 3 + stacked)[-2]
        return dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=heads)

    towers = any(name.startswith("img/") for name in names)
    img = "img/" if towers else ""
    if f"{img}cls" in names:
        raise CheckpointError(f"{source.where}: {img}cls: towers with a class token are not read from this layout; use a release in the Hugging Face layout.")
    patch, _, channels, width = shape(f"{img}embedding/kernel", 4)
    side = math.isqrt(shape(f"{img}pos_embedding", 3)[1])
    image = dict(encoder(f"{img}Transformer"), patch_size=patch, channels=channels, image_size=side * patch,
                 pool="map" if f"{img}MAPHead_0/probe" in names else "gap")
    if any(name.startswith("llm/") for name in names):
        width = shape("img/head/kernel", 2)[1]
        language = _gemma(shape, names)
        if language["width"] != width or "img/MAPHead_0/probe" in names:
            raise CheckpointError(f"{source.where}: img/head/kernel gives {width} numbers, llm/embedder/input_embedding has {language['width']}; a tower that "
                                  "does not pool, and whose head has the width of the language model, is expected.")
        return dict(name="paligemma", image=image | dict(pool="none"), language=language)
    if f"{img}head/kernel" in names:
        image |= dict(projection="linear", embed_dim=shape(f"{img}head/kernel", 2)[1])
    if not towers:
        return dict(name="vit", **image)
    vocab_size, _ = shape("txt/Embed_0/embedding", 2)
    text = dict(encoder("txt/Encoder_0"), vocab_size=vocab_size, length=shape("txt/pos_embedding", 3)[1], pool="last")
    text |= dict(projection="linear", embed_dim=shape("txt/head/kernel", 2)[1]) if "txt/head/kernel" in names else dict(projection=None)
    return dict(name="siglip", image=image, text=text, embed_dim=text.get("embed_dim", text["width"]), loss="sigmoid" if "b" in names else "softmax")


def _gemma(shape: Any, names: Any) -> dict[str, Any]:
    """Settings of the decoder: sizes of the arrays, and all else of the published Gemma, or Gemma 2 where there are norms behind the parts of a block."""
    stacked = "llm/layers/mlp/linear" in names
    block, axes = ("llm/layers", 1) if stacked else ("llm/layers/0", 0)
    depth = (shape("llm/layers/mlp/linear", 3)[0] if stacked
             else len([name for name in names if name.startswith("llm/layers/") and name.endswith("/mlp/linear")]))
    vocab_size, width = shape("llm/embedder/input_embedding", 2)
    heads, head_dim, _ = shape(f"{block}/attn/attn_vec_einsum/w", 3 + axes)[axes:]
    groups = heads if f"{block}/attn/qkv_einsum/w" in names else shape(f"{block}/attn/kv_einsum/w", 4 + axes)[axes + 1]
    settings = dict(vocab_size=vocab_size, width=width, depth=depth, mlp_dim=shape(f"{block}/mlp/linear", 2 + axes)[axes], num_heads=heads,
                    num_kv_heads=groups, head_dim=head_dim, embed_scale=width ** 0.5)
    if f"{block}/post_attention_norm/scale" not in names:
        return {**DECODER["gemma-2b"], **settings}
    # The largest Gemma 2 alone divides queries by the root of width / heads instead of that of the head's width.
    largest = DECODER["gemma2-27b"]
    known = (width, depth, heads) == tuple(largest[name] for name in ("width", "depth", "num_heads"))
    return {**DECODER["gemma2-2b"], **settings, "attention_scale": largest["attention_scale"] if known else head_dim ** -0.5}


def rows(model: Any, stacked: bool = False, stacked_language: bool = True) -> Rows:
    """The table of a model; `stacked`: blocks as one array with a layer axis (big_vision's scan) instead of one a layer; `stacked_language`: those of
    PaliGemma's language model, all of whose releases have them so."""
    if isinstance(model, PrefixLM):
        tower, decoder = model.parts()
        return [*_image(f"{PREFIX}img/", "image/", tower, stacked), *_same(f"{PREFIX}img/head", "projection", ("kernel", "bias")),
                *_language(f"{PREFIX}llm/", "language/", decoder, stacked_language), OTHERS]
    if isinstance(model, Vit):
        return [*_image(PREFIX, "", model, stacked), OTHERS]
    image, text = model.towers()
    table = [*_image(f"{PREFIX}img/", "image/", image, stacked), *_text(f"{PREFIX}txt/", "text/", text, stacked),
             Row(f"{PREFIX}t", "logit_scale", scalar), OTHERS]
    return table + ([Row(f"{PREFIX}b", "logit_bias", scalar)] if model.loss == "sigmoid" else [])


def is_stacked(source: Source) -> bool:
    """Whether the blocks of a file are stacked."""
    return any("/encoderblock/" in name for name in source.names())


def is_stacked_language(source: Source) -> bool:
    """Whether the blocks of PaliGemma's language model are stacked."""
    return any(name.endswith("llm/layers/mlp/linear") for name in source.names())


def _encoder(theirs: str, ours: str, stacked: bool) -> list[Row]:
    block = f"{theirs}/encoderblock" if stacked else theirs + "/encoderblock_{i}"
    return [*(Row(f"{block}/{one}", f"{ours}blocks/{other}") for one, other in _LAYER_PARTS), *_same(f"{theirs}/encoder_norm", f"{ours}norm")]


def _same(theirs: str, ours: str, parts: tuple[str, ...] = ("scale", "bias")) -> list[Row]:
    return [Row(f"{theirs}/{part}", f"{ours}/{part}") for part in parts]


def _image(theirs: str, ours: str, tower: Any, stacked: bool) -> list[Row]:
    kernel = ("kernel", "bias")
    table = [*_same(f"{theirs}embedding", f"{ours}patch_embedding", kernel), Row(f"{theirs}pos_embedding", f"{ours}position_embedding", first_axis),
             *_encoder(f"{theirs}Transformer", ours, stacked)]
    if tower.pool == "map":
        head, pooling = f"{theirs}MAPHead_0", f"{ours}pooling"
        table += [Row(f"{head}/probe", f"{pooling}/probe", first_axis), *_same(f"{head}/LayerNorm_0", f"{pooling}/norm"),
                  *_same(f"{head}/MlpBlock_0/Dense_0", f"{pooling}/mlp/up", kernel), *_same(f"{head}/MlpBlock_0/Dense_1", f"{pooling}/mlp/down", kernel)]
        attention = f"{head}/MultiHeadDotProductAttention_0"
        table += [row for part in ("query", "key", "value", "out") for row in _same(f"{attention}/{part}", f"{pooling}/{part}", kernel)]
    return table + (_same(f"{theirs}head", f"{ours}projection", kernel) if tower.projection else [])


def _text(theirs: str, ours: str, tower: Any, stacked: bool) -> list[Row]:
    return [Row(f"{theirs}Embed_0/embedding", f"{ours}token_embedding"), Row(f"{theirs}pos_embedding", f"{ours}position_embedding", first_axis),
            *_encoder(f"{theirs}Encoder_0", ours, stacked), *(_same(f"{theirs}head", f"{ours}projection", ("kernel", "bias")) if tower.projection else [])]


def _language(theirs: str, ours: str, decoder: Any, stacked: bool) -> list[Row]:
    block, blocks = f"{theirs}layers" if stacked else theirs + "layers/{i}", f"{ours}blocks"
    query, key, value = (f"{blocks}/attention/{part}/kernel" for part in ("query", "key", "value"))
    if decoder.num_heads == (decoder.num_kv_heads or decoder.num_heads):
        table = [Row(f"{block}/attn/qkv_einsum/w", (query, key, value), _parts_of_heads(3))]
    else:
        table = [Row(f"{block}/attn/q_einsum/w", query, _HEADS), Row(f"{block}/attn/kv_einsum/w", (key, value), _parts_of_heads(2))]
    norms = [("pre_attention_norm", "norm_attention"), ("pre_ffw_norm", "norm_mlp")]
    if decoder.norm_place == "both":
        norms += [("post_attention_norm", "norm_attention_out"), ("post_ffw_norm", "norm_mlp_out")]
    return [Row(f"{theirs}embedder/input_embedding", f"{ours}token_embedding"), Row(f"{theirs}final_norm/scale", f"{ours}norm/scale"), *table,
            Row(f"{block}/attn/attn_vec_einsum/w", f"{blocks}/attention/out/kernel"),
            Row(f"{block}/mlp/gating_einsum", (f"{blocks}/mlp/gate/kernel", f"{blocks}/mlp/up/kernel"), _GATED),
            Row(f"{block}/mlp/linear", f"{blocks}/mlp/down/kernel"), *(Row(f"{block}/{one}/scale", f"{blocks}/{other}/scale") for one, other in norms)]
