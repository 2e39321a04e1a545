"""What `compare` runs: the inputs of ours as those of transformers' classes, and the states after every layer on both sides."""
from collections.abc import Iterator, Mapping
import contextlib
from typing import Any

import jax
import numpy as np

from vlm_jax.encoders.naflex_vit import NaflexVit
from vlm_jax.interop.config_reader import Section

Pair = tuple[str, np.ndarray, np.ndarray]


@contextlib.contextmanager
def recorded(module: Any) -> Iterator[dict[str, list[np.ndarray]]]:
    """While it is entered, the output of every layer of every stack of layers is kept: {name of the stack: [after layer 0, ...]}."""
    import torch
    found: dict[str, list[np.ndarray]] = {}
    handles = []

    def keep(name: str):
        def hook(_, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            found[name].append(output.detach().float().numpy())
        return hook

    for name, part in module.named_modules():
        if isinstance(part, torch.nn.ModuleList) and len({type(layer) for layer in part}) == 1 and not any(name.startswith(f"{other}.") for other in found):
            found[name] = []
            handles += [layer.register_forward_hook(keep(name)) for layer in part]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layers(stacks: Mapping[str, list[np.ndarray]], ours: Mapping[str, Any], keep: Mapping[str, np.ndarray]) -> Iterator[Pair]:
    """Pairs of states after every layer. `ours`: {words of the stack's name: states [L, ...]}; `keep`: {the same: places that are no padding [B, T]}."""
    left = dict(ours)
    for name, states in stacks.items():
        words = next((words for words in left if any(word in name for word in words.split("|"))), None)
        if words is None or not states:
            continue
        mine = np.asarray(left.pop(words)["output"], np.float32)
        for number, (one, other) in enumerate(zip(mine, states)):
            where = keep.get(words)
            if where is not None and one.shape == other.shape:
                one, other = one[where], other[where]
            yield f"{name}.{number}", one, other


def tower_pairs(theirs: Any, ours: Any, inputs: dict[str, np.ndarray], apply: Any) -> Iterator[Pair]:
    """Dual encoders and towers alone."""
    arguments, keep = {}, {}
    naflex = "image" in inputs and inputs["image"].ndim == 3
    if naflex:
        patches = inputs["image"]
        there = patches[..., 0] > 0
        arguments |= dict(pixel_values=tensor(patches[..., 2:]), pixel_attention_mask=tensor(there.astype(np.int64)),
                          spatial_shapes=tensor(patches[..., :2].max(1).astype(np.int64)))
        keep["vision|layer"] = there
    elif "image" in inputs:
        arguments["pixel_values"] = tensor(inputs["image"].transpose(0, 3, 1, 2))
    if "tokens" in inputs:
        arguments["input_ids"] = tensor(inputs["tokens"].astype(np.int64))
    with recorded(theirs) as stacks:
        expected = theirs(**arguments)
    if "image" in inputs and "tokens" in inputs:
        (image, text), out = apply(ours, inputs["image"], inputs["tokens"])
        yield from layers(stacks, {"text_model": out["text"]["blocks"], "vision|layer": out["image"]["blocks"]}, keep)
        yield "image embedding", image, array(expected.image_embeds)
        yield "text embedding", text, array(expected.text_embeds)
        logits = np.exp(out["logit_scale"]) * np.asarray(image) @ np.asarray(text).T + out.get("logit_bias", 0.0)
        yield "logits of images and texts", logits, array(expected.logits_per_image)
        return
    output, out = apply(ours, inputs.get("image", inputs.get("tokens")))
    yield from layers(stacks, {"vision|layer": out["blocks"]}, keep)
    if getattr(ours.model, "pool", "") == "none":
        where = keep.get("vision|layer", slice(None)) if isinstance(ours.model, NaflexVit) else slice(None)
        yield "output", np.asarray(output)[where], array(expected.last_hidden_state)[where]
        return
    names = ("logits", "image_embeds", "text_embeds", "pooler_output") if ours.model.projection else ("pooler_output",)
    found = next((expected[name] for name in names if expected.get(name) is not None), None)
    yield "output", output, array(expected.last_hidden_state[:, 0] if found is None else found)


def language_pairs(theirs: Any, ours: Any, inputs: dict[str, np.ndarray], apply: Any) -> Iterator[Pair]:
    """Decoders, encoder-decoders, BERT, and models of pictures and text."""
    inputs = {**inputs}
    config = Section(ours.config["hf"])
    arguments: dict[str, Any] = {}
    valid = None
    if "tokens" in inputs:
        tokens = inputs["tokens"] = inputs["tokens"].astype(np.int32)
        valid = inputs["valid"] = np.asarray(inputs.get("valid", np.ones(tokens.shape, bool)))
        if "slots" in inputs:
            tokens = np.where(inputs["slots"] >= 0, config.integer("image_token_index", config.integer("image_token_id", 0, least=0), least=0), tokens)
            inputs["prefix"] = valid    # a prompt alone: everything sees everything
            arguments["token_type_ids"] = tensor(np.zeros(tokens.shape, np.int64))
        arguments |= dict(input_ids=tensor(tokens.astype(np.int64)), attention_mask=tensor(valid.astype(np.int64)))
    if "images" in inputs:
        images = inputs["images"]
        images = inputs["images"] = images[:, None] if images.ndim == 4 else images
        arguments["pixel_values"] = tensor(images.reshape(-1, *images.shape[2:]).transpose(0, 3, 1, 2))
    if "patches" in inputs:
        arguments |= dict(flattened_patches=tensor(inputs["patches"]), attention_mask=tensor((inputs["patches"][..., 0] > 0).astype(np.float32)))
    if "targets" in inputs:
        targets = inputs["targets"] = inputs["targets"].astype(np.int32)
        shifted = np.concatenate([np.full_like(targets[:, :1], getattr(ours.model, "start_id", 0)), targets[:, :-1]], 1)
        arguments["decoder_input_ids"] = tensor(shifted.astype(np.int64))
    with recorded(theirs) as stacks:
        expected = theirs(**arguments)
    output, out = apply(ours, inputs)
    if "targets" in inputs:
        there = inputs["patches"][..., 0] > 0 if "patches" in inputs else valid
        encoder = out.get("encoder", {})
        yield from layers(stacks, {"encoder": encoder.get("blocks", encoder), "decoder": out.get("decoder", {})}, {"encoder": there})
        kept = slice(None)
    else:
        parts = {"vision": out["image"]["blocks"]} if isinstance(out.get("image"), Mapping) and "blocks" in out["image"] else {}
        yield from layers(stacks, {**parts, "layer|.h|blocks": out["blocks"]}, {"layer|.h|blocks": valid})
        kept = valid
    found = next((expected[name] for name in ("logits", "prediction_logits") if expected.get(name) is not None), None)
    yield "logits" if found is not None else "output", np.asarray(output)[kept], array(expected.last_hidden_state if found is None else found)[kept]


def compiled(ours: Any, *inputs: Any) -> Any:
    """Our model, applied."""
    return jax.jit(lambda params, *given: ours.model.apply({"params": params}, *given))(ours.params, *inputs)


def tensor(values: np.ndarray) -> Any:
    """A numpy array as torch's."""
    import torch
    return torch.from_numpy(np.ascontiguousarray(values))


def array(values: Any) -> np.ndarray:
    """A torch tensor as numpy's, float32."""
    return values.detach().float().numpy()
