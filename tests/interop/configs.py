"""config.json of tiny models, one of each family of pictures, as transformers writes them."""
from tests.interop.reference import IMAGE, SIZES, TEXT

_TEXT = dict(TEXT, eos_token_id=1)
_NAFLEX = dict(SIZES, num_hidden_layers=1, num_patches=16, patch_size=3)

CONFIGS = {
    "siglip": dict(model_type="siglip", architectures=["SiglipModel"], dtype="float32", vision_config=dict(IMAGE, model_type="siglip_vision_model"),
                   text_config=dict(_TEXT, projection_size=36, model_type="siglip_text_model", layer_norm_eps=1e-6)),
    "siglip2": dict(model_type="siglip2", architectures=["Siglip2Model"], vision_config=_NAFLEX, text_config=_TEXT),
    "clip": dict(model_type="clip", architectures=["CLIPModel"], projection_dim=10, vision_config=dict(IMAGE, hidden_act="quick_gelu"), text_config=TEXT,
                 logit_scale_init_value=2.6592),
    "vit": dict(model_type="vit", architectures=["ViTForImageClassification"], id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}, qkv_bias=True,
                layer_norm_eps=1e-12, hidden_act="gelu", **IMAGE),
}
