"""The trained parts of OpenFlamingo: a state dict with the resampler, the gated blocks and the table of tokens, as safetensors.

Awadalla et al., "OpenFlamingo" (2023). The file names gated blocks by the layer of the language model that they stand before, either in a list of their own or
as part of that layer. What else such a file may hold (the frozen tower and language model) is not read: it comes from their own directories.
"""
from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from vlm_jax.errors import CheckpointError
from vlm_jax.interop.families import language_config as common, parts
from vlm_jax.interop.safetensors import show
from vlm_jax.interop.table import Row, Rows, Source
from vlm_jax.interop.transforms import fused, heads_in, heads_out, linear, scalar

NEW_TOKENS = ("<|endofchunk|>", "<image>", "<PAD>")     # in the order of their ids; the last only where the tokenizer had none
HEAD_DIM = 64    # of both kinds of attention; the file does not say it
WRAPPERS = re.compile(r"^module\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.|_orig_mod\.")
GATED = (re.compile(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.(.+)"), re.compile(r"lang_encoder\.[a-z_.]+\.(\d+)\.gated_cross_attn_layer\.(.+)"))
TABLES = {name: key for key, names in {
    "embedding": ("transformer.wte", "gpt_neox.embed_in", "model.embed_tokens", "model.decoder.embed_tokens"), "head": ("lm_head", "embed_out")}.items()
    for name in (f"lang_encoder.{name}.weight" for name in names)}
FROZEN = ("vision_encoder.", "lang_encoder.")


class TrainedParts:
    """The trained tensors of a file under names that do not depend on the language model; a `table.Source`.

    `perceiver.*` as in the file, `gated.{i}.*` counting blocks, `embedding` and `head` [tokens, width] where the file has them.

    Attributes:
      places: the layer of the language model before which each gated block stands.
    Raises:
      CheckpointError: if the file is of something else, or has no gated blocks.
    """

    def __init__(self, source: Source):
        self.where, self._source = source.where, source
        found: dict[str, str] = {}
        blocks: dict[tuple[int, str], str] = {}
        unknown = []
        for original in source.names():
            name = WRAPPERS.sub("", original)
            match = next((match for pattern in GATED if (match := pattern.fullmatch(name))), None)
            if match is not None:
                blocks.setdefault((int(match[1]), match[2]), original)    # some files list them twice
            elif name in TABLES or name.startswith("perceiver."):
                found[TABLES.get(name, name)] = original
            elif not name.startswith(FROZEN):
                unknown.append(original)
        if unknown or not blocks or "perceiver.latents" not in found:
            cause = f"{show(unknown[0])} is none of its tensors" if unknown else "it has no gated blocks" if not blocks else "it has no perceiver.latents"
            raise CheckpointError(f"{self.where}: this is no state dict of OpenFlamingo ({cause}); give the file of its trained parts as safetensors.")
        self.places = sorted({layer for layer, _ in blocks})
        self._names = found | {f"gated.{self.places.index(layer)}.{rest}": original for (layer, rest), original in blocks.items()}

    def names(self) -> list[str]:
        """The names."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one.

        Raises:
          CheckpointError: if it is missing.
        """
        if name not in self._names:
            raise CheckpointError(f"{self.where}: {show(name)} is missing; give a whole state dict of OpenFlamingo.")
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one."""
        return self._source.dtype(self._names[name])

    def read(self, name: str, index: Any = None) -> np.ndarray:
        """One tensor, or a part of it."""
        return self._source.read(self._names[name], index)


def to_settings(source: TrainedParts, depth: int, head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """The settings `gated`, `resampler` and `image_features` of a `CrossAttentionLM`, from the sizes of the tensors.

    Args:
      depth: layers of the language model.
      head_dim: of all attention, which no size shows.
    Raises:
      CheckpointError: for blocks at uneven places, or heads that do not divide the projections.
    """
    first = source.places[0]
    every = first + 1
    if source.places != list(range(first, depth, every)):
        raise CheckpointError(f"{source.where}: its gated blocks stand before the layers {show(source.places)} of a language model of {depth}; use the one "
                              "that it was trained with.")
    latents, width = source.shape("perceiver.latents")
    layers = {int(name.split(".")[2]) for name in source.names() if name.startswith("perceiver.layers.")}
    frames = source.shape("perceiver.frame_embs")[0] if "perceiver.frame_embs" in source.names() else None
    resampler = dict(num_latents=latents, depth=len(layers), num_heads=_heads(source, "perceiver.layers.0.0.to_q.weight", head_dim), head_dim=head_dim,
                     mlp_ratio=source.shape("perceiver.layers.0.1.1.weight")[0] // width, activation="gelu", frame_embedding=frames is not None,
                     **({} if frames is None else {"max_frames": frames}))
    gated = dict(every=every, first=first, num_heads=_heads(source, "gated.0.attn.to_q.weight", head_dim), head_dim=head_dim,
                 mlp_dim=source.shape("gated.0.ff.1.weight")[0], activation="gelu", norm_media=False)
    return {"image_features": "unnormalised", "gated": gated, "resampler": resampler}


def _heads(source: TrainedParts, name: str, head_dim: int) -> int:
    inner = source.shape(name)[0]
    if inner % head_dim:
        raise CheckpointError(f"{source.where}: heads of {head_dim} do not divide the {inner} outputs of {show(name)}; give head_dim as it was trained with.")
    return inner // head_dim


def rows(settings: Mapping[str, Any]) -> Rows:
    """The weight table of `resampler` and `gated`, of the settings that `to_settings` gave."""
    resampler, gated = settings["resampler"], settings["gated"]
    perceiver, ours = "perceiver.layers.{i}.", "resampler/blocks/"
    table = [Row("perceiver.latents", "resampler/latents"), *parts.norm("perceiver.norm", "resampler/norm"),
             *parts.norm(f"{perceiver}0.norm_media", f"{ours}attention/norm_features"),
             *parts.norm(f"{perceiver}0.norm_latents", f"{ours}attention/norm_latents"),
             *_attention(f"{perceiver}0.", f"{ours}attention/", resampler["num_heads"], resampler["head_dim"]), *_mlp(f"{perceiver}1.", ours)]
    if resampler["frame_embedding"]:
        table.append(Row("perceiver.frame_embs", "resampler/frame_embedding"))
    block, ours = "gated.{i}.", "gated/blocks/"
    return [*table, *parts.norm(f"{block}attn.norm", f"{ours}norm_cross"),
            *_attention(f"{block}attn.", f"{ours}cross_attention/", gated["num_heads"], gated["head_dim"]), *_mlp(f"{block}ff.", ours),
            Row(f"{block}attn_gate", f"{ours}gate_cross", scalar), Row(f"{block}ff_gate", f"{ours}gate_mlp", scalar)]


def _attention(theirs: str, ours: str, heads: int, head_dim: int) -> Rows:
    """Queries alone, keys and values in one kernel."""
    inner = heads * head_dim
    return [Row(f"{theirs}to_q.weight", f"{ours}query/kernel", heads_out(heads)), Row(f"{theirs}to_out.weight", f"{ours}out/kernel", heads_in(heads)),
            Row(f"{theirs}to_kv.weight", tuple(f"{ours}{name}/kernel" for name in common.ATTENTION[1:]), fused((inner, inner), (heads_out(heads),) * 2))]


def _mlp(theirs: str, ours: str) -> Rows:
    """A sequence of norm, map, activation and map."""
    return [*parts.norm(f"{theirs}0", f"{ours}norm_mlp"), Row(f"{theirs}1.weight", f"{ours}mlp/up/kernel", linear),
            Row(f"{theirs}3.weight", f"{ours}mlp/down/kernel", linear)]
