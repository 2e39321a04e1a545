"""The decoding programs that the ahead-of-time analysis compiles: lengths of prompts and answers, and the programs of a child and of an absent TPU."""
import importlib.util

import jax.numpy as jnp
import pytest

from vlm_jax.analysis.hlo import parse
from vlm_jax.analysis.program import compile_programs
from vlm_jax.analysis.report import findings, table
from vlm_jax.compile import run
from vlm_jax.decoding.abstract import prompt_of_format
from vlm_jax.errors import ConfigError
from vlm_jax.registry import build
from vlm_jax.sharding.topologies import parse_topology
from vlm_jax.training.config import load_config

PALIGEMMA, PALI = "configs/paligemma/paligemma_3b.py:variant=test", "configs/pali/pali3_5b.py:variant=test"


def test_prompt_and_answer_of_a_format():
    """An encoder-decoder's lengths are its own; a decoder's text is shared, half each."""
    row, target = ((33,), jnp.int32), ((7,), jnp.float32)
    pali, paligemma = build("pali", preset="test"), build("paligemma", preset="test")
    shapes = {"tokens": row, "targets": target, "loss_weights": target}
    inputs, answer = prompt_of_format(pali, shapes, dict(kind="encoder_decoder", length=33, target_length=7))
    assert inputs == {"tokens": row} and answer == 7
    images = ((1, 24, 24, 3), jnp.float32)
    inputs, answer = prompt_of_format(paligemma, {"tokens": row, "prefix": row, "images": images, "loss_weights": row},
                                      dict(kind="prefix_lm", length=33, image_tokens=9))
    assert answer == 12 and inputs == {"tokens": ((21,), jnp.int32), "prefix": ((21,), jnp.int32), "images": images}
    with pytest.raises(ConfigError, match="Pali is an encoder-decoder; choose encoder_decoder"):
        prompt_of_format(pali, {}, dict(kind="causal", length=4))


def test_programs_of_generating_models():
    """Eight devices hold two rows each: bytes of the cache follow from the shapes; an evaluation of such a model is the same two programs."""
    prompt, step = compile_programs(load_config(PALIGEMMA), "local", [{"what": "evaluate"}])
    assert (prompt.name, step.name) == ("generate/prompt", "generate/step") and prompt.rows == {"prompts": 16} and step.rows == {"tokens": 16}
    language = build("paligemma", preset="test").parts()[1]
    s = language.block_settings()
    cache_length = 32 + 12   # of 33 tokens 12 are the answer; the bucket of the 21 others is 32
    assert step.state["cache"] == 2 * (2 * language.depth * cache_length * s.groups * s.head_size * 4 + 4 * cache_length + 3 * 4)
    assert step.state["params"] == 4 * step.parameters and prompt.useful_flops > step.useful_flops > 0
    assert step.memory["alias"] >= step.state["cache"]   # written in place
    found = findings({}, parse_topology("local"), step, "generate")
    assert found["memory"]["cache"] == step.state["cache"] and found["roofline"] and "generate/step" in table(found)


def test_command_line_and_the_messages(capsys):
    found = run(["--config", PALI, "--what", "generate", "--batch", "3", "--quick"])
    assert [one["program"] for one in found] == ["generate/prompt", "generate/step"] and found[1]["batch"] == {"tokens": 8}   # a row for each device
    assert "8, 1.0 a device" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="generates no text; compile what=train or evaluate"):
        compile_programs(load_config("configs/siglip/shapes.py:variant=test"), "local", [{"what": "generate"}])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install vlm_jax[test] has it)")
def test_layers_stay_stacked_on_a_tpu_that_is_not_there():
    """The host that compiles is a CPU, whose decoding unrolls the layers; the TPU's does not."""
    _, step = compile_programs(load_config(PALIGEMMA), "v5e-4", [{"what": "generate", "batch": 4}])
    loops = [one for computation in parse(step.hlo).computations.values() for one in computation.values() if one.opcode == "while"]
    assert len(loops) >= 2 and step.memory is not None and step.devices == 4   # over tokens, and inside over layers
