"""Image towers by name, for the models that are composed of them."""
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict

from vlm_jax.encoders.naflex_vit import NaflexVit
from vlm_jax.encoders.nfnet import NFNet
from vlm_jax.encoders.variants import NF_RESNET, variant
from vlm_jax.encoders.vit import Vit
from vlm_jax.settings import choose

# name -> (class, what its settings are where they are silent)
IMAGE_TOWERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {"vit": (Vit, {}), "naflex": (NaflexVit, {}), "nfnet": (NFNet, {}),
                                                                   "nf_resnet": (NFNet, NF_RESNET)}


def sized(settings: Mapping[str, Any], defaults: Mapping[str, Any] = FrozenDict()) -> dict[str, Any]:
    """Settings with the sizes that their `variant` stands for: what they say themselves comes before those, and they before the defaults."""
    settings = dict(settings)
    size = settings.pop("variant", None)
    return {**defaults, **({} if size is None else variant(size)), **settings}


def named_tower(settings: Mapping[str, Any], key: str, where: str,
                towers: Mapping[str, tuple[type[nn.Module], dict[str, Any]]] = IMAGE_TOWERS) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of a tower and its `sized` settings, of a section of settings in which `key` names the tower ("vit" where it is silent).

    Raises:
      ConfigError: for an unknown tower or variant, naming `where.key`.
    """
    settings = dict(settings)
    tower, defaults = choose(towers, settings.pop(key, "vit"), f"{where}.{key}")
    return tower, sized(settings, defaults)
