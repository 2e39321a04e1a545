"""Test-side weight mapping from transformers' SigLIP and CLIP classes to our parameter tree, and the tolerances of parity."""
import numpy as np

FLOAT32_BLOCK, FLOAT32_MODEL, BFLOAT16_FACTOR = 1e-5, 1e-4, 1.5


def relative_error(ours, reference) -> float:
    """max|a - b| / max|b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def perturb(module, seed=0, scale=0.1):
    """Adds noise to every parameter: ones and zeros would hide swapped parameters."""
    import torch
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def numpy_state(module, gradients=False) -> dict:
    """name -> float32 array of the parameters, or of their gradients."""
    values = {name: p.grad if gradients else p for name, p in module.named_parameters()}
    return {name: value.detach().float().numpy() for name, value in values.items() if value is not None}


def _norm(state, prefix):
    return {"scale": state[f"{prefix}.weight"], "bias": state[f"{prefix}.bias"]}


def _dense(state, prefix, bias=True):
    out = {"kernel": state[f"{prefix}.weight"].T}
    return {**out, "bias": state[f"{prefix}.bias"]} if bias else out


def _heads(weight, bias, heads):
    width = weight.shape[1]
    return {"kernel": weight.T.reshape(width, heads, -1), "bias": bias.reshape(heads, -1)}


def _out(weight, bias, heads):
    return {"kernel": weight.T.reshape(heads, -1, weight.shape[0]), "bias": bias}


def _mlp(state, prefix):
    return {"up": _dense(state, f"{prefix}.fc1"), "down": _dense(state, f"{prefix}.fc2")}


def block(state, prefix, heads):
    """One encoder layer of either library class."""
    attention = {name: _heads(state[f"{prefix}.self_attn.{key}_proj.weight"], state[f"{prefix}.self_attn.{key}_proj.bias"], heads)
                 for name, key in (("query", "q"), ("key", "k"), ("value", "v"))}
    attention["out"] = _out(state[f"{prefix}.self_attn.out_proj.weight"], state[f"{prefix}.self_attn.out_proj.bias"], heads)
    return {"attention": attention, "norm_attention": _norm(state, f"{prefix}.layer_norm1"), "norm_mlp": _norm(state, f"{prefix}.layer_norm2"),
            "mlp": _mlp(state, f"{prefix}.mlp")}


def stacked(trees):
    """Trees of equal structure, stacked on a new first axis."""
    first = trees[0]
    return {key: stacked([tree[key] for tree in trees]) for key in first} if isinstance(first, dict) else np.stack(trees)


def _blocks(state, prefix, depth, heads):
    return stacked([block(state, f"{prefix}.{i}", heads) for i in range(depth)])


def siglip_image(state, depth, heads, prefix="vision_model."):
    """SiglipVisionModel -> Vit with pool="map"."""
    e = f"{prefix}embeddings."
    tree = {"patch_embedding": {"kernel": state[f"{e}patch_embedding.weight"].transpose(2, 3, 1, 0), "bias": state[f"{e}patch_embedding.bias"]},
            "position_embedding": state[f"{e}position_embedding.weight"],
            "blocks": _blocks(state, f"{prefix}encoder.layers", depth, heads), "norm": _norm(state, f"{prefix}post_layernorm")}
    h = f"{prefix}head."
    weights, biases = np.split(state[f"{h}attention.in_proj_weight"], 3), np.split(state[f"{h}attention.in_proj_bias"], 3)
    tree["pooling"] = {"probe": state[f"{h}probe"][0], "norm": _norm(state, f"{h}layernorm"), "mlp": _mlp(state, f"{h}mlp"),
                       "out": _out(state[f"{h}attention.out_proj.weight"], state[f"{h}attention.out_proj.bias"], heads),
                       **{name: _heads(w, b, heads) for name, w, b in zip(("query", "key", "value"), weights, biases)}}
    return tree


def siglip(state, image_depth, text_depth, heads):
    """SiglipModel -> DualEncoder."""
    t = "text_model."
    e = f"{t}embeddings."
    text = {"token_embedding": state[f"{e}token_embedding.weight"], "position_embedding": state[f"{e}position_embedding.weight"],
            "blocks": _blocks(state, f"{t}encoder.layers", text_depth, heads), "norm": _norm(state, f"{t}final_layer_norm"),
            "projection": _dense(state, f"{t}head")}
    scalars = {name: state[name][0] for name in ("logit_scale", "logit_bias")}
    return {"image": siglip_image(state, image_depth, heads), "text": text, **scalars}


def clip(state, image_depth, text_depth, image_heads, text_heads):
    """CLIPModel -> DualEncoder."""
    v, t = "vision_model.", "text_model."
    image = {"patch_embedding": {"kernel": state[f"{v}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)},
             "class_token": state[f"{v}embeddings.class_embedding"][None], "position_embedding": state[f"{v}embeddings.position_embedding.weight"],
             "norm_before": _norm(state, f"{v}pre_layrnorm"), "blocks": _blocks(state, f"{v}encoder.layers", image_depth, image_heads),
             "norm": _norm(state, f"{v}post_layernorm"), "projection": _dense(state, "visual_projection", bias=False)}
    e = f"{t}embeddings."
    text = {"token_embedding": state[f"{e}token_embedding.weight"], "position_embedding": state[f"{e}position_embedding.weight"],
            "blocks": _blocks(state, f"{t}encoder.layers", text_depth, text_heads), "norm": _norm(state, f"{t}final_layer_norm"),
            "projection": _dense(state, "text_projection", bias=False)}
    return {"image": image, "text": text, "logit_scale": state["logit_scale"]}
