"""What language models read, and what both libraries give for it."""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity.configurations import Configuration
from vlm_jax.interop.directory import Imported

SEQ2SEQ = ("t5", "mt5", "umt5")
ENCODERS = ("bert", "bert_pretraining", "bert_base")


def batch(configuration: Configuration) -> dict[str, np.ndarray]:
    """Tokens, and which are valid; of encoder-decoders also targets. At least one row is full."""
    rng = np.random.default_rng(configuration.seed)

    def texts(length: int, padding: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(0, configuration.settings["vocab_size"], (configuration.rows, length))
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
    """The reference's logits (of BertModel: its states), at the places that are not padding."""
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
