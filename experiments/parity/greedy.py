"""Greedy answers of both libraries, token for token."""
from typing import Any

import numpy as np

from experiments.parity.configurations import Configuration
from experiments.parity.pictures import interleaved_arguments
from experiments.parity.texts import ENCODERS, SEQ2SEQ
from vlm_jax.decoding import generate
from vlm_jax.interop.directory import Imported

ANSWERING = ("idefics",)   # beside the language models: models that read pictures and whose answers are compared
MARGIN = 1e-4   # of the two likeliest tokens' logits; below it rounding decides


def greedy(model: Any, configuration: Configuration, loaded: Imported, inputs: dict[str, np.ndarray], longest: int = 6) -> dict[str, Any]:
    """{"greedy_tokens": how many tokens were compared, "greedy_equal": whether all are equal}; {} where there is no room for an answer.

    Prompts are padded left, as `generate` of transformers needs them; a row counts up to the first token whose margin is below `MARGIN`.
    """
    import torch
    if configuration.family in ENCODERS:
        return {}
    limits = [configuration.settings[key] for key in ("n_positions", "max_seq_len") if key in configuration.settings]
    limits += [configuration.settings["max_position_embeddings"]] if configuration.config_class == "OPTConfig" else []
    room = longest if configuration.family in SEQ2SEQ else min([longest, *(limit - configuration.length for limit in limits)])
    if room < 1:
        return {}
    order = np.argsort(inputs["valid"], axis=1, kind="stable")
    read = {name: np.take_along_axis(value, order, axis=1) if value.ndim == 2 else value for name, value in inputs.items()}
    prompt = interleaved_arguments(model, configuration, read) if configuration.family in ANSWERING else {
        "input_ids": torch.tensor(read["tokens"]), "attention_mask": torch.tensor(read["valid"].astype(np.int64))}
    # The reference makes a cache of as many layers as the encoder has, and fails where the decoder has more.
    arguments = {"decoder_start_token_id": 0, "use_cache": False} if configuration.family in SEQ2SEQ else {}
    if configuration.settings.get("sliding_window") == 1:   # the reference's cache keeps all keys then, and its cached answers differ from its uncached ones
        arguments["use_cache"] = False
    if configuration.family in ANSWERING:
        model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = model.generate(**prompt, max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=0, return_dict_in_generate=True,
                              output_logits=True, **arguments)
    logits = np.stack([step.numpy() for step in made.logits], axis=1)
    best = np.sort(logits, axis=-1)
    clear = np.cumprod(best[..., -1] - best[..., -2] > MARGIN, axis=1).astype(bool)
    ours = generate(loaded.model, loaded.params, {**read, "tokens": read["tokens"].astype(np.int32)}, max_tokens=room).tokens
    return {"greedy_tokens": int(clear.sum()), "greedy_equal": bool((ours == logits.argmax(-1))[clear].all())}
