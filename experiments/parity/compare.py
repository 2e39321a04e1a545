"""One configuration computed by transformers and by vlm_jax, through files: config.json and safetensors of one are what the other reads."""
from collections.abc import Callable
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity.configurations import Configuration
from vlm_jax.interop.directory import Imported, load_directory, save_directory

SEQ2SEQ = ("t5", "mt5", "umt5")
ENCODERS = ("bert", "bert_pretraining", "bert_base")


def reference(configuration: Configuration, dtype: str = "float32") -> Any:
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
            spread = 0.3 if parameter.ndim == 1 else 0.9 * parameter.shape[-1] ** -0.5
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))
    return model.to(getattr(torch, dtype))


def batch(configuration: Configuration, vocab_size: int) -> dict[str, np.ndarray]:
    """Tokens, and which are valid; of encoder-decoders also targets. At least one row is full."""
    rng = np.random.default_rng(configuration.seed)

    def texts(length: int, padding: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(0, vocab_size, (configuration.rows, length))
        lengths = rng.integers(1, length + 1, configuration.rows)
        lengths[0] = length if configuration.rows > 1 or padding == "none" else lengths[0]
        places = np.arange(length)[None]
        if padding == "none":
            return tokens, np.ones(tokens.shape, bool)
        return tokens, places >= length - lengths[:, None] if padding == "left" else places < lengths[:, None]

    made = dict(zip(("tokens", "valid"), texts(configuration.length, configuration.padding)))
    if configuration.family in SEQ2SEQ:
        made |= dict(zip(("targets", "target_valid"), texts(configuration.target_length, "none" if configuration.padding == "none" else "right")))
    if configuration.family in ENCODERS:
        made["types"] = rng.integers(0, configuration.settings["type_vocab_size"], made["tokens"].shape)
    return made


def shifted(values: np.ndarray, first: int) -> np.ndarray:
    """What the decoder of an encoder-decoder reads for these targets."""
    return np.concatenate([np.full_like(values[:, :1], first), values[:, :-1]], axis=1)


def run_reference(model: Any, configuration: Configuration, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The reference's logits (of BertModel: its states), with NaN where there is padding."""
    import torch
    valid = inputs["valid"]
    arguments = {"input_ids": torch.tensor(inputs["tokens"]), "attention_mask": torch.tensor(valid.astype(np.int64))}
    if configuration.family in SEQ2SEQ:
        valid = shifted(inputs["target_valid"], True)
        arguments |= {"decoder_input_ids": torch.tensor(shifted(inputs["targets"], 0)), "decoder_attention_mask": torch.tensor(valid.astype(np.int64))}
    elif configuration.family in ENCODERS:
        arguments["token_type_ids"] = torch.tensor(inputs["types"])
    elif configuration.family not in ("mpt", "opt"):
        arguments["position_ids"] = torch.tensor(np.maximum(valid.cumsum(1) - 1, 0))
    with torch.no_grad():
        out = model(**arguments)
    if configuration.family == "bert_base":
        logits = out.last_hidden_state
    else:
        logits = out.prediction_logits if configuration.family == "bert_pretraining" else out.logits
    return masked(logits.float().numpy(), valid)


def run_ours(loaded: Imported, configuration: Configuration, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Our logits for the same inputs; layers are unrolled for odd seeds, a scan for even ones."""
    model = loaded.model.clone(scan=configuration.seed % 2 == 0)
    valid = inputs["valid"] if configuration.family not in SEQ2SEQ else shifted(inputs["target_valid"], True)
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    logits, _ = jax.jit(lambda params, arrays: model.apply({"params": params}, arrays))(loaded.params, arrays)
    return masked(np.asarray(logits, np.float32), valid)


def masked(logits: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The logits of valid places [N, V]."""
    return logits[valid]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |a - b| / max |b|."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


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
      {"float32": relative error of our logits, "export": of the logits of transformers from the files that we write, "round_trip": whether our parameters come
      back from those files bit for bit, "bfloat16": our relative error to the float32 reference, "reference_bfloat16": the reference's own}.
    """
    folder = Path(folder)
    model = reference(configuration)
    inputs = batch(configuration, configuration.settings["vocab_size"])
    model.save_pretrained(folder / "theirs")
    expected = run_reference(model, configuration, inputs)
    found: dict[str, Any] = {}
    if "float32" in dtypes:
        loaded = load_directory(folder / "theirs")
        found["float32"] = relative_error(run_ours(loaded, configuration, inputs), expected)
        save_directory(loaded, folder / "ours")
        again = type(model).from_pretrained(folder / "ours", attn_implementation="eager").eval()
        found["export"] = relative_error(run_reference(again, configuration, inputs), expected)
        found["round_trip"] = equal_trees(load_directory(folder / "ours").params, loaded.params)
        if also is not None:
            found |= also(model, configuration, loaded, inputs)
    if "bfloat16" in dtypes:
        found["reference_bfloat16"] = relative_error(run_reference(reference(configuration, "bfloat16"), configuration, inputs), expected)
        found["bfloat16"] = relative_error(run_ours(load_directory(folder / "theirs", dtype="bfloat16"), configuration, inputs), expected)
    return found
