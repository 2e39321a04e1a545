"""One configuration computed by transformers and by vlm_jax, through files: config.json and safetensors of one are what the other reads."""
from collections.abc import Callable
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.parity import configurations, picture_configurations, pictures, texts
from experiments.parity.configurations import Configuration
from vlm_jax.interop.directory import Imported, load_directory, save_directory

FAMILIES = {**configurations.FAMILIES, **picture_configurations.FAMILIES}


def sample(family: str, seed: int) -> Configuration:
    """Configuration number `seed` of a family; those of equal seed modulo 4 have the same rows and padding."""
    return (picture_configurations if family in picture_configurations.FAMILIES else configurations).sample(family, seed)


def reference(configuration: Configuration) -> Any:
    """The reference model with perturbed weights, in evaluation mode. Its weights are numbers of bfloat16, so that both dtypes compute one function."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    torch.manual_seed(configuration.seed)
    settings = json.loads(json.dumps(configuration.settings))
    model = getattr(transformers, configuration.architecture)(getattr(transformers, configuration.config_class)(**settings)).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(configuration.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            inputs = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1] if parameter.ndim else 1   # of a convolution, or of a linear map
            spread = 0.3 if parameter.ndim <= 1 else 0.9 * inputs ** -0.5
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))
    return model


def reread(model: Any, folder: str | os.PathLike, dtype: str = "float32") -> Any:
    """What the reference reads from a folder. (Converted in memory its buffers, as the frequencies of rotations, would be rounded too.)"""
    return type(model).from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def relative_error(ours: Any, theirs: Any) -> float:
    """max |a - b| / max |b|; of several arrays the largest."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


def equal_trees(one: Any, other: Any) -> bool:
    """Whether two parameter trees are the same, bit for bit."""
    leaves, others = jax.tree_util.tree_leaves_with_path(one), jax.tree_util.tree_leaves_with_path(other)
    return len(leaves) == len(others) and all(
        path == again and a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for (path, a), (again, b) in zip(leaves, others))


def compare(configuration: Configuration, folder: str | os.PathLike, dtypes: tuple[str, ...] = ("float32", "bfloat16"),
            also: Callable[[Any, Configuration, Imported, dict[str, np.ndarray]], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Measures one configuration.

    Args:
      folder: an empty folder for the files.
      also: further measurements in float32, of (reference, configuration, ours, inputs).
    Returns:
      {"float32": relative error of our logits or embeddings, "export": of those of transformers from the files that we write, "round_trip": whether our
      parameters come back from those files bit for bit, "bfloat16": our relative error to the float32 reference, "reference_bfloat16": the reference's own}.
    """
    folder = Path(folder)
    model = reference(configuration)
    kind = pictures if configuration.family in picture_configurations.FAMILIES else texts
    inputs = kind.batch(configuration)
    model.save_pretrained(folder / "theirs")
    expected = kind.run_reference(model, configuration, inputs)
    found: dict[str, Any] = {}
    if "float32" in dtypes:
        loaded = load_directory(folder / "theirs")
        found["float32"] = relative_error(kind.run_ours(loaded, configuration, inputs), expected)
        save_directory(loaded, folder / "ours")
        found["export"] = relative_error(kind.run_reference(reread(model, folder / "ours"), configuration, inputs), expected)
        found["round_trip"] = equal_trees(load_directory(folder / "ours").params, loaded.params)
        if also is not None:
            found |= also(model, configuration, loaded, inputs)
    if "bfloat16" in dtypes:
        found["reference_bfloat16"] = relative_error(kind.run_reference(reread(model, folder / "theirs", "bfloat16"), configuration, inputs), expected)
        found["bfloat16"] = relative_error(kind.run_ours(load_directory(folder / "theirs", dtype="bfloat16"), configuration, inputs), expected)
    return found
