"""Rules over virtual per-layer paths: precedence, cut stacks, what they refuse, the table."""
from hypothesis import given, strategies as st
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.training.stages import Rules
from vlm_jax.training.trees import flatten, is_stacked, unflatten, virtual_paths

PARAMS = {
    "image": {"blocks": {"mlp": {"up": {"kernel": np.zeros((4, 3, 5)), "bias": np.zeros((4, 5))}}}, "norm": {"scale": np.zeros(3)}},
    "text": {"blocks": {"out": {"kernel": np.zeros((2, 3, 3))}}, "embedding": np.zeros((7, 3))},
    "logit_scale": np.zeros(()),
}


def test_paths_and_virtual_paths():
    table = flatten(PARAMS)
    assert set(table) == {"image/blocks/mlp/up/kernel", "image/blocks/mlp/up/bias", "image/norm/scale", "text/blocks/out/kernel", "text/embedding",
                          "logit_scale"}
    assert list(flatten(unflatten(table))) == list(table)
    assert virtual_paths("image/blocks/mlp/up/kernel", (2, 3)) == ["image/blocks/0/mlp/up/kernel", "image/blocks/1/mlp/up/kernel"]
    assert virtual_paths("text/embedding", (7, 3)) == ["text/embedding"]
    assert is_stacked("a/blocks/b") and not is_stacked("a/blocks") and not is_stacked("my_blocks/b")


def test_the_first_match_wins():
    rules = Rules([("image/.*", None), ("(image|text)/.*", {"lr": 0.1}), (".*", {"weight_decay": 0.5})], PARAMS)
    assert not rules.leaves["image/norm/scale"].moves
    assert rules.leaves["text/embedding"].lr == 0.1 and rules.leaves["text/embedding"].weight_decay == 1
    assert rules.leaves["logit_scale"].lr == 1 and rules.leaves["logit_scale"].weight_decay == 0.5
    assert set(flatten(rules.trained(PARAMS))) == {"text/blocks/out/kernel", "text/embedding", "logit_scale"}
    assert len(rules.frozen_paths()) == 3


def test_a_rule_that_cuts_a_stack_becomes_a_vector():
    rules = Rules([("image/blocks/3/.*", {}), ("image/blocks/2/.*", {"lr": 0.5, "weight_decay": 0}), ("image/.*", None), (".*", {})], PARAMS)
    kernel, bias = rules.leaves["image/blocks/mlp/up/kernel"], rules.leaves["image/blocks/mlp/up/bias"]
    assert kernel.lr.shape == (4, 1, 1) and bias.lr.shape == (4, 1) and kernel.lr.dtype == np.float32
    assert kernel.lr.ravel().tolist() == [0, 0, 0.5, 1] and kernel.weight_decay.ravel().tolist() == [0, 0, 0, 1]
    assert kernel.mask.ravel().tolist() == [False, False, True, True] and kernel.moves
    assert rules.leaves["text/blocks/out/kernel"].mask is None


@given(st.lists(st.integers(0, 3), unique=True, max_size=3))
def test_frozen_layers_are_exactly_those_named(layers):
    pattern = f"image/blocks/({'|'.join(map(str, layers))})/.*"
    rules = Rules(([(pattern, None)] if layers else []) + [(".*", {})], PARAMS)
    mask = rules.leaves["image/blocks/mlp/up/kernel"].mask
    assert (mask is None) == (not layers)
    if layers:
        assert [i for i in range(4) if not mask.ravel()[i]] == sorted(layers)


@pytest.mark.parametrize("train, expected", [
    ([("imgae/.*", None), (".*", {})], 't[0]: "imgae/.*" matches no parameter.'),
    ([("image/blocks/4/.*", None), (".*", {})], 't[0]: "image/blocks/4/.*" matches no parameter.'),
    ([("image/.*", {}), ("image/norm/.*", None), (".*", {})],
     't[1]: "image/norm/.*" decides nothing, earlier rules match all of its parameters; move it up'),
    ([("image/.*", {})], 't: the last rule is "image/.*"; end with (".*", {}) or (".*", None), so that every parameter is decided.'),
    ([(".*", None)], "t freezes every parameter; let at least one rule train."),
    ([("image/(", None), (".*", {})], 't[0]: "image/(" is not a regular expression'),
    ([(".*", {"lrr": 1})], 't[0].lrr: Multipliers takes no such setting. Did you mean "lr"?'),
    ([(".*", {"lr": 0})], "t[0].lr is 0; it must be a positive factor (None instead of the settings freezes)."),
    ([(".*",)], "t[0] is ('.*',); write (regex, settings or None)"),
    ([(".*", 0.1)], "t[0]: the settings are 0.1; write a mapping"),
    ([], "t must be a list of (regex, settings or None)"),
])
def test_messages(train, expected):
    with pytest.raises(ConfigError) as caught:
        Rules(train, PARAMS, where="t")
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_summary():
    rules = Rules([("image/blocks/[01]/.*", None), ("image/.*", {"lr": 0.1}), (".*", {})], PARAMS)
    assert rules.summary().splitlines() == [
        "rule                  trains               tensors  parameters",
        "image/blocks/[01]/.*  frozen                     2          40",
        "image/.*              lr x 0.1, decay x 1        3          43",
        ".*                    lr x 1, decay x 1          3          40",
    ]
