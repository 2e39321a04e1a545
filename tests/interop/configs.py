"""config.json of tiny models, one of each family, as transformers writes them."""
from tests.interop.reference import IMAGE, SIZES, TEXT

_TEXT = dict(TEXT, eos_token_id=1)
_NAFLEX = dict(SIZES, num_hidden_layers=1, num_patches=16, patch_size=3)
_DECODER = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, vocab_size=41,
                max_position_embeddings=32, bos_token_id=0, eos_token_id=1)

CONFIGS = {
    "siglip": dict(model_type="siglip", architectures=["SiglipModel"], dtype="float32", vision_config=dict(IMAGE, model_type="siglip_vision_model"),
                   text_config=dict(_TEXT, projection_size=36, model_type="siglip_text_model", layer_norm_eps=1e-6)),
    "siglip2": dict(model_type="siglip2", architectures=["Siglip2Model"], vision_config=_NAFLEX, text_config=_TEXT),
    "clip": dict(model_type="clip", architectures=["CLIPModel"], projection_dim=10, vision_config=dict(IMAGE, hidden_act="quick_gelu"), text_config=TEXT,
                 logit_scale_init_value=2.6592),
    "vit": dict(model_type="vit", architectures=["ViTForImageClassification"], id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}, qkv_bias=True,
                layer_norm_eps=1e-12, hidden_act="gelu", **IMAGE),
    "llama": dict(_DECODER, model_type="llama", architectures=["LlamaForCausalLM"], rms_norm_eps=1e-6, rope_theta=10000.0, attention_bias=False,
                  rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "qwen2": dict(_DECODER, model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True),
    "gemma2": dict(_DECODER, model_type="gemma2", head_dim=6, query_pre_attn_scalar=6, sliding_window=4, attn_logit_softcapping=50.0,
                   final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh"),
    "gemma3": dict(_DECODER, model_type="gemma3_text", head_dim=6, query_pre_attn_scalar=6, sliding_window=4, rope_local_base_freq=10000.0,
                   layer_types=["sliding_attention", "full_attention"]),
    "gpt2": dict(model_type="gpt2", n_embd=12, n_layer=2, n_head=3, n_positions=16, vocab_size=41, activation_function="gelu_new", n_inner=None),
    "opt": dict(model_type="opt", hidden_size=12, num_hidden_layers=2, num_attention_heads=3, ffn_dim=20, vocab_size=41, max_position_embeddings=16,
                word_embed_proj_dim=8, do_layer_norm_before=True, activation_function="relu"),
    "gpt_neox": dict(model_type="gpt_neox", hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, vocab_size=41, rotary_pct=0.25,
                     max_position_embeddings=16, use_parallel_residual=True),
    "phi": dict(_DECODER, model_type="phi", partial_rotary_factor=0.5, hidden_act="gelu_new"),
    "mpt": dict(model_type="mpt", d_model=12, n_heads=3, n_layers=2, expansion_ratio=2, max_seq_len=16, vocab_size=41, no_bias=True,
                attn_config=dict(alibi=True, attn_type="multihead_attention", clip_qkv=None, qk_ln=False)),
    "t5": dict(model_type="t5", architectures=["T5ForConditionalGeneration"], d_model=12, d_kv=4, d_ff=20, num_layers=2, num_decoder_layers=1, num_heads=3,
               vocab_size=41, feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=16),
    "bert": dict(model_type="bert", architectures=["BertModel"], hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
                 vocab_size=41, type_vocab_size=2, max_position_embeddings=16),
    "paligemma": dict(model_type="paligemma", image_token_index=40, projection_dim=12, hidden_size=12, vision_config=dict(IMAGE, vision_use_head=False),
                      text_config=dict(_DECODER, model_type="gemma", head_dim=6)),
    "pix2struct": dict(model_type="pix2struct", text_config=dict(hidden_size=12, d_kv=4, d_ff=20, num_heads=3, num_layers=2, vocab_size=41),
                       vision_config=dict(hidden_size=12, patch_embed_hidden_size=27, d_kv=4, d_ff=20, num_attention_heads=3, num_hidden_layers=2, seq_len=16)),
}
