"""big_vision's two-tower and image checkpoints (.npz): SigLIP and SigLIP 2 at fixed resolution. All sizes are read from the arrays.

The released code: github.com/google-research/big_vision, models/vit.py, models/proj/image_text/{two_towers,text_transformer}.py.
"""
import math
from typing import Any

from vlm_jax.encoders.vit import Vit
from vlm_jax.errors import CheckpointError
from vlm_jax.interop.table import Ignored, Row, Rows, Source
from vlm_jax.interop.transforms import first_axis, scalar

PREFIX = "params/"
RENAMES = ((r"^opt/target/", "params/"),)
OTHERS = Ignored(r"(opt|chrono|extra|states?)/.*")
_LAYER_PARTS = ((("LayerNorm_0/scale", "norm_attention/scale"), ("LayerNorm_0/bias", "norm_attention/bias"), ("LayerNorm_1/scale", "norm_mlp/scale"),
                 ("LayerNorm_1/bias", "norm_mlp/bias"))
                + tuple((f"MultiHeadDotProductAttention_0/{part}/{kind}", f"attention/{part}/{kind}")
                        for part in ("query", "key", "value", "out") for kind in ("kernel", "bias"))
                + tuple((f"MlpBlock_0/{theirs}/{kind}", f"mlp/{ours}/{kind}")
                        for theirs, ours in (("Dense_0", "up"), ("Dense_1", "down")) for kind in ("kernel", "bias")))


def to_settings(source: Source) -> dict[str, Any]:
    """The model that the arrays are of.

    Raises:
      CheckpointError: if they are not those of a SigLIP or of its image tower.
    """
    names = {name.removeprefix("opt/target/").removeprefix(PREFIX): name for name in source.names()}

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in names:
            raise CheckpointError(f"{source.where}: {name} is missing; SigLIP's two towers (img, txt, t, b) or its image tower alone can be read.")
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
    if f"{img}head/kernel" in names:
        image |= dict(projection="linear", embed_dim=shape(f"{img}head/kernel", 2)[1])
    if not towers:
        return dict(name="vit", **image)
    vocab_size, _ = shape("txt/Embed_0/embedding", 2)
    text = dict(encoder("txt/Encoder_0"), vocab_size=vocab_size, length=shape("txt/pos_embedding", 3)[1], pool="last")
    text |= dict(projection="linear", embed_dim=shape("txt/head/kernel", 2)[1]) if "txt/head/kernel" in names else dict(projection=None)
    return dict(name="siglip", image=image, text=text, embed_dim=text.get("embed_dim", text["width"]), loss="sigmoid" if "b" in names else "softmax")


def rows(model: Any, stacked: bool = False) -> Rows:
    """The table of a model; `stacked`: blocks as one array with a layer axis (big_vision's scan) instead of one a layer."""
    if isinstance(model, Vit):
        return [*_image(PREFIX, "", model, stacked), OTHERS]
    image, text = model.towers()
    table = [*_image(f"{PREFIX}img/", "image/", image, stacked), *_text(f"{PREFIX}txt/", "text/", text, stacked),
             Row(f"{PREFIX}t", "logit_scale", scalar), OTHERS]
    return table + ([Row(f"{PREFIX}b", "logit_bias", scalar)] if model.loss == "sigmoid" else [])


def is_stacked(source: Source) -> bool:
    """Whether the blocks of a file are stacked."""
    return any("/encoderblock/" in name for name in source.names())


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
