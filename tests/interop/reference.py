"""Tiny models of transformers with perturbed weights, saved as directories; and the comparison of ours with them."""
import numpy as np

from tests.models.parity import perturb

SIZES = dict(hidden_size=36, intermediate_size=52, num_attention_heads=3)
IMAGE = dict(SIZES, num_hidden_layers=2, image_size=23, patch_size=7)      # 3 x 3 patches and two pixels left over
TEXT = dict(hidden_size=36, intermediate_size=40, num_attention_heads=2, num_hidden_layers=1, vocab_size=41, max_position_embeddings=6, bos_token_id=0,
            eos_token_id=40, pad_token_id=1)


def siglip(seed=0, **vision):
    import transformers
    text = {**TEXT, "hidden_size": 24, "projection_size": 36, "eos_token_id": 1}
    return make(transformers.SiglipModel, transformers.SiglipConfig(vision_config={**IMAGE, **vision}, text_config=text), seed)


def siglip_vision(seed=0, **vision):
    import transformers
    return make(transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**{**IMAGE, **vision}), seed)


def siglip2(seed=0, **vision):
    import transformers
    sizes = {**SIZES, "num_hidden_layers": 1, "num_patches": 16, "patch_size": 3, **vision}
    return make(transformers.Siglip2Model, transformers.Siglip2Config(vision_config=sizes, text_config={**TEXT, "eos_token_id": 1}), seed)


def clip(seed=0, eos_token_id=40, **vision):
    import transformers
    config = transformers.CLIPConfig(vision_config={**IMAGE, **vision}, text_config={**TEXT, "eos_token_id": eos_token_id}, projection_dim=10)
    return make(transformers.CLIPModel, config, seed)


def vit(seed=0, labels=None, **vision):
    import transformers
    config = transformers.ViTConfig(**{**IMAGE, **vision}, **({"num_labels": labels} if labels else {}))
    return make(transformers.ViTForImageClassification if labels else transformers.ViTModel, config, seed)


def make(cls, config, seed=0):
    import torch
    torch.manual_seed(seed)
    return perturb(cls(config), seed)


def pictures(*shape, seed=0):
    """The same pictures for both: numpy [B, H, W, 3] and torch [B, 3, H, W]."""
    import torch
    values = np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)
    return values, torch.from_numpy(values.transpose(0, 3, 1, 2).copy())


def tokens(batch, length, vocabulary=41, seed=0):
    """The same texts for both."""
    import torch
    values = np.random.default_rng(seed).integers(0, vocabulary, (batch, length))
    return values, torch.from_numpy(values)
