"""Programs compiled in a child: for simulated devices, for TPUs that are not there, and the errors of both."""
import importlib.util

import pytest

from vlm_jax.analysis.hlo import parse
from vlm_jax.analysis.program import compile_program, compile_programs, out_of_memory
from vlm_jax.errors import ConfigError
from vlm_jax.training.config import load_config

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install vlm_jax[test] has it)")
CONFIG = "configs/siglip/shapes.py:variant=test"


def test_local_programs_of_training_and_evaluation():
    """Bytes follow from the shapes: eight devices hold the parameters whole and an eighth of the batch each."""
    train, image, text = compile_programs(load_config(CONFIG), "local", [{"what": "train", "batch": 16}, {"what": "evaluate"}])
    assert (train.name, image.name, text.name) == ("train", "evaluate/image", "evaluate/text")
    assert train.rows == {"pairs": 16} and image.rows == {"image": 64} and train.devices == train.mesh["data"] == 8
    assert train.state["params"] == 4 * train.parameters and train.state["optimizer"] >= 8 * train.parameters
    assert train.state["batch"] == 2 * (24 * 24 * 3 * 4 + 16 * 4 + 1 + 4 + 4)
    assert train.memory["argument"] >= train.state["params"] + train.state["optimizer"] and train.peak > train.memory["argument"]
    assert train.executed_flops >= train.useful_flops > 0 and train.replicated[0] == 1.0
    assert text.useful_flops > 0 < image.useful_flops and parse(image.hlo).entry


def test_files_of_a_published_config_need_not_exist():
    """Its shards and tokenizer are nowhere."""
    config = load_config("configs/siglip/b16_webli.py:topology=cpu-2")
    config.model = dict(name="siglip", preset="test")
    (program,) = compile_programs(config, "cpu-2", [{"batch": 16}])
    assert program.mesh["data"] * program.mesh["fsdp"] == 2 and program.memory is not None and program.rows == {"pairs": 16}


def test_errors_come_back_from_the_child():
    config = load_config(CONFIG)
    with pytest.raises(ConfigError, match="Did you mean"):
        compile_program(config, "local", what="trian")
    with pytest.raises(ConfigError, match="the config has 1"):
        compile_program(config, "cpu-2", stage=3)
    config.mesh = dict(data=3)
    with pytest.raises(ConfigError, match="mesh data=3"):
        compile_program(config, "cpu-2")


def test_the_compilers_message_about_memory():
    assert out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.") == int(20.5 * 2 ** 30)
    assert out_of_memory("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (200.00G) exceeds available HBM (15.75G).") == 200 * 2 ** 30
    assert out_of_memory("RESOURCE_EXHAUSTED: no figure here") == 0
    assert out_of_memory("INVALID_ARGUMENT: something else") is None


@needs_libtpu
@pytest.mark.parametrize("topology, devices", [("v5e-4", 4), *(pytest.param(name, size, marks=pytest.mark.slow)
                                                                for name, size in (("v5e-8", 8), ("v5p-16", 8), ("v4-8", 4), ("v6e-8", 8)))])
def test_small_configs_compile_for_every_tpu(topology, devices):
    config = load_config(CONFIG)
    (program,) = compile_programs(config, topology, [{"batch": 16}])
    assert program.devices == devices and len(program.places) == devices and all(len(place) == 4 for place in program.places)
    assert program.memory is not None and 2 ** 20 < program.peak < 2 ** 30 and "ENTRY" in program.hlo
