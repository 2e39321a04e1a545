import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from vlm_jax import registry
from vlm_jax.errors import ConfigError


def test_families_and_presets():
    assert {"clip", "lit", "siglip", "siglip2", "vit", "naflex_vit", "text"} <= set(registry.families())
    for family in ("clip", "lit", "siglip", "siglip2"):
        assert {"test", "emoji", "shapes"} < set(registry.presets(family))
    assert {"b16-224", "b16-256", "l16-256", "l16-384", "so400m14-224", "so400m14-384"} < set(registry.presets("siglip"))
    assert {"b16-224", "b16-256", "b32-256", "l16-256", "so400m14-224", "g-opt16-256"} < set(registry.presets("siglip2"))
    assert {"b32-224", "b16-224", "l14-224", "l14-336"} < set(registry.presets("clip"))


@pytest.mark.parametrize("family, preset", [(f, p) for f in ("siglip", "siglip2", "clip", "lit") for p in registry.presets(f)])
def test_every_preset_has_shapes(family, preset):
    model = registry.build(family, preset)
    shapes = model.input_shapes()
    size = preset.rpartition("-")[2]
    if size.isdigit():
        assert shapes["image"] == (int(size), int(size), 3)
    assert hash(model) == hash(registry.build(family, preset))


def test_overrides_are_merged_section_by_section():
    model = registry.build("siglip", "emoji", text=dict(length=28, vocab_size=8192), dtypes=dict(compute="bfloat16"), remat="full")
    assert model.input_shapes() == {"image": (48, 48, 3), "tokens": (28,)}
    assert (model.dtype, model.param_dtype, model.remat, model.text["depth"]) == ("bfloat16", "float32", "full", 2)
    wider = registry.build("siglip", "emoji", image=dict(variant="S/8", image_size=[48, 40]), text=dict(variant="Ti"), embed_dim=384)
    assert wider.input_shapes()["image"] == (48, 40, 3)
    assert registry.settings("siglip", "emoji")["image"]["patch_size"] == 12   # the table is untouched
    out = jax.eval_shape(wider.init_with_output, jax.random.key(0), jnp.zeros((1, 48, 40, 3)), jnp.zeros((1, 16), jnp.int32))
    assert out[0][1]["image"]["stem"].shape == (1, 30, 384)


@pytest.mark.parametrize("arguments, overrides, message", [
    (("siglp", "test"), {}, 'model.name: "siglp" is unknown. Did you mean "siglip'),
    (("siglip", "b16-225"), {}, 'model.preset of "siglip": "b16-225" is unknown. Did you mean "b16-2'),
    (("siglip", "test"), dict(text=dict(lenght=3)), 'model.text.lenght: TextTransformer takes no such setting. Did you mean "length"'),
    (("siglip", "test"), dict(imge=dict(depth=3)), 'model.imge: DualEncoder takes no such setting. Did you mean "image"'),
    (("siglip", "test"), dict(image=3), "model.image is a section, got 3"),
    (("siglip", "test"), dict(dtypes=dict(compute="bfloat8")), '"bfloat8" is not a float type'),
    (("siglip", "test"), dict(dtypes=dict(compte="bfloat16")), "dtypes.compte"),
    (("siglip", "test"), dict(image=dict(width=65)), "its embeddings are 65 wide"),
])
def test_errors(arguments, overrides, message):
    with pytest.raises(ConfigError, match=message):
        registry.build(*arguments, **overrides)


def test_families_are_imported_when_asked_for():
    code = "import sys, vlm_jax.registry; assert not any(m.startswith(('vlm_jax.models', 'flax')) for m in sys.modules), 'eager'"
    subprocess.run([sys.executable, "-c", code], check=True)
