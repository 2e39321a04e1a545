"""Learning-rate schedules against closed forms and Optax."""
import math

from hypothesis import given, strategies as st
import numpy as np
import optax
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.training.schedules import SCHEDULES, build_schedule


def test_cosine_equals_optax():
    ours = build_schedule(dict(name="cosine", peak=3e-3, warmup=7, final=0.1), 40)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 7, 40, 3e-4)
    np.testing.assert_allclose([ours(i) for i in range(41)], [theirs(i) for i in range(41)], rtol=2e-6, atol=1e-9)


def test_rsqrt_with_warmup_and_cooldown():
    rate = build_schedule(dict(name="rsqrt", peak=2.0, warmup=10, timescale=5, cooldown=20), 100)
    for step in (0, 3, 10, 30, 80, 95, 99):
        expected = 2 * min(1, step / 10) / math.sqrt(1 + max(step - 10, 0) / 5) * min(1, (100 - step) / 20)
        assert float(rate(step)) == pytest.approx(expected, rel=1e-6)
    longer = build_schedule(dict(name="rsqrt", peak=2.0, warmup=10, timescale=5, cooldown=20), 200)
    assert float(longer(60)) == float(rate(60))   # a run can be prolonged


def test_linear_and_constant():
    line = build_schedule(dict(name="linear", peak=1.0, warmup=2, final=0.5), 12)
    assert [float(line(step)) for step in (0, 1, 2, 7, 12, 20)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    level = build_schedule(dict(name="constant", peak=0.5, cooldown=4), 10)
    assert [float(level(step)) for step in (0, 5, 6, 8, 10)] == [0.5, 0.5, 0.5, 0.25, 0.0]


@given(name=st.sampled_from(sorted(SCHEDULES)), warmup=st.integers(0, 20), step=st.integers(0, 60))
def test_rates_lie_between_0_and_the_peak(name, warmup, step):
    rate = build_schedule(dict(name=name, peak=0.3, warmup=warmup), 40)
    assert 0 <= float(rate(step)) <= 0.3 * (1 + 1e-6)
    assert float(rate(warmup)) == pytest.approx(0.3, rel=1e-6)
    assert rate.peak == 0.3


@pytest.mark.parametrize("settings, expected", [
    (dict(name="cosine", peak=1.0, warmup=11), "s: warmup=11 do not fit into steps=10; shorten the warm-up or train longer."),
    (dict(name="rsqrt", peak=1.0, warmup=6, cooldown=5), "s: warmup=6 and cooldown=5 do not fit into steps=10; shorten them or train longer."),
    (dict(name="cosin", peak=1.0), 's.name: "cosin" is unknown. Did you mean "cosine"?'),
    (dict(name="cosine"), "s.peak is missing: cosine needs it; add it to the config."),
    (dict(name="cosine", peak=0.0), "s.peak is 0.0; the learning rate must be positive."),
    (dict(name="cosine", peak="1e-3"), "s.peak is '1e-3'; it must be a number."),
    (dict(name="cosine", peak=1.0, cooldown=1), "s.cooldown: cosine takes no such setting."),
    (dict(name="cosine", peak=1.0, steps=3), "s.steps is set by the program; remove it from the config."),
    (dict(peak=1.0), "s.name is missing; choose one of constant, cosine, linear, rsqrt."),
])
def test_messages(settings, expected):
    with pytest.raises(ConfigError) as caught:
        build_schedule(settings, 10, "s")
    assert str(caught.value).startswith(expected)
