"""Presets of the cross-attention language models: Flamingo, OpenFlamingo, IDEFICS, and small ones for tests and studies.

Sources: Alayrac et al., "Flamingo" (2022), table 5 and section B.1 (sizes), appendix A.1.1 (resampler); Awadalla et al., "OpenFlamingo" (2023), table 1, and
the released settings; Laurençon et al., "OBELICS" (2023), and the released config.json of IDEFICS.
"""
from typing import Any

from vlm_jax.language.presets import DECODER

Settings = dict[str, Any]


def _flamingo(width: int, depth: int, every: int) -> Settings:
    """An NFNet-F6 and a language model of the Chinchilla kind.

    Differs from the paper: positions of the language model are rotary; Chinchilla's are relative, with a further matrix a layer, so that the paper counts
    1.4, 7.1 and 70 billion parameters where this has 1.34, 8.3 and 65. (7.1 does not fit 40 layers of width 4096.) Keys of the resampler have 128 numbers,
    which gives the 194 million that the paper counts; its final version says 96.
    """
    heads = width // 128
    language = dict(vocab_size=32_000, width=width, depth=depth, mlp_dim=4 * width, num_heads=heads, norm="rms", norm_eps=1e-5, activation="gelu", gated=False,
                    tied=False, max_positions=2048, new_tokens=1)
    return dict(image=dict(tower="nfnet", variant="F6", image_size=320), language=language, gated=dict(every=every, num_heads=heads, head_dim=128),
                resampler=dict(num_latents=64, depth=6, width=1536, num_heads=16, head_dim=128))


# Radford et al., "CLIP" (2021): what OpenFlamingo reads of L/14 are patches before the last norm.
_CLIP_L14 = dict(variant="L/14", image_size=224, pool="cls", patch_bias=False, norm_before=True, activation="quick_gelu", norm_eps=1e-5, resample="bicubic")


def _open_flamingo(language: Settings, every: int) -> Settings:
    """Blocks before the layers every - 1, 2 every - 1, ...; `<|endofchunk|>` and `<image>` are new tokens."""
    return dict(image=_CLIP_L14, image_features="unnormalised", language=dict(language, new_tokens=2),
                gated=dict(every=every, first=every - 1, num_heads=8, head_dim=64, activation="gelu", norm_media=False),
                resampler=dict(num_latents=64, depth=6, num_heads=8, head_dim=64, activation="gelu", frame_embedding=False))


def _idefics(width: int, depth: int, mlp_dim: int, num_heads: int, norm_eps: float) -> Settings:
    """OpenCLIP's H/14, LLaMA, RMS norms and gated MLPs in the new blocks; queries and keys are normalised there and in the resampler."""
    image = dict(variant="H/14", image_size=224, pool="cls", patch_bias=False, norm_before=True, activation="gelu", norm_eps=1e-5, resample="bicubic_dino")
    language = dict(DECODER["llama-2-7b"], width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads, norm_eps=norm_eps, max_positions=2048, new_tokens=2)
    gated = dict(every=4, num_heads=num_heads, mlp_dim=mlp_dim, norm="rms", norm_eps=norm_eps, norm_media=False, activation="silu", gated=True, qk_norm="rms")
    return dict(image=image, image_features="unnormalised_with_class", language=language, gated=gated,
                resampler=dict(num_latents=64, depth=6, num_heads=16, head_dim=96, activation="relu", qk_norm="layer", frame_embedding=False))


def _small(size: int, patch: int, width: int, heads: int, image_depth: int, depth: int, vocab_size: int, latents: int, every: int = 1,
           scan: bool = False) -> Settings:
    """The tower of the SigLIP of the same name and a decoder of its width; unrolled, which is the faster way on a CPU."""
    return dict(image=dict(image_size=size, patch_size=patch, width=width, depth=image_depth, mlp_dim=4 * width, num_heads=width // 32),
                language=dict(vocab_size=vocab_size, width=width, depth=depth, mlp_dim=4 * width, num_heads=heads, activation="gelu", gated=False,
                              new_tokens=1),
                gated=dict(every=every, num_heads=heads, head_dim=width // heads),
                resampler=dict(num_latents=latents, depth=2, num_heads=heads, head_dim=width // heads), scan=scan)


FLAMINGO: dict[str, Settings] = {
    "test": _small(24, 8, 64, 2, 2, 3, 512, 4, every=2, scan=True),
    "shapes": _small(32, 8, 128, 4, 4, 4, 1024, 8),
    "flamingo-3b": _flamingo(2048, 24, 1),
    "flamingo-9b": _flamingo(4096, 40, 4),
    "flamingo-80b": _flamingo(8192, 80, 7),
}

OPEN_FLAMINGO: dict[str, Settings] = {
    "test": dict(_open_flamingo(dict(DECODER["mpt-7b"], width=32, depth=3, mlp_dim=64, num_heads=4, vocab_size=512), 2),
                 image=dict(_CLIP_L14, image_size=24, patch_size=8, width=32, depth=1, mlp_dim=64, num_heads=2, variant=None)),
    "openflamingo-3b": _open_flamingo(DECODER["mpt-1b"], 1),
    "openflamingo-4b": _open_flamingo(dict(DECODER["pythia-2.8b"], vocab_size=50_432, parallel=False, rope=dict(fraction=1.0)), 2),
    "openflamingo-9b": _open_flamingo(DECODER["mpt-7b"], 4),
}

IDEFICS: dict[str, Settings] = {
    "test": dict(_idefics(32, 3, 48, 4, 1e-6), image=dict(image_size=24, patch_size=8, width=32, depth=1, mlp_dim=64, num_heads=2, pool="cls", patch_bias=False,
                                                         norm_before=True, activation="gelu", norm_eps=1e-5),
                 resampler=dict(num_latents=4, depth=1, num_heads=2, head_dim=8, activation="relu", qk_norm="layer", frame_embedding=False)),
    "idefics-9b": _idefics(4096, 32, 11_008, 32, 1e-6),
    "idefics-80b": _idefics(8192, 80, 22_016, 64, 1e-5),
}
IDEFICS["test"]["language"] |= dict(vocab_size=512)
