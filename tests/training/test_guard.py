"""The guard: what is a spike and what is not; a rejected step leaves no trace; evidence; the end after too many in a row."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_loop import losses, shapes
from vlm_jax import faults
from vlm_jax.errors import ConfigError, DivergedError
from vlm_jax.sharding.mesh import put_batch
from vlm_jax.training import setup
from vlm_jax.training.config import resolve
from vlm_jax.training.guard import Evidence, Guard, Spike, read_events, read_guard
from vlm_jax.training.loop import train
from vlm_jax.training.metrics import read_metrics
from vlm_jax.training.trees import flatten


def verdicts(guard, values, norm=1.0):
    """Runs a sequence of losses through a guard; returns the numbers of the steps that it rejects, and its last state."""
    judge = jax.jit(guard.judge)
    state, rejected = guard.init(), []
    for number, value in enumerate(values):
        take, state, facts = judge(state, jnp.float32(value), jnp.float32(norm))
        assert bool(take) == bool(facts["finite"] and not facts["spike"])
        if not take:
            rejected.append(number)
    return rejected, state


def noisy(count, mean=5.0, deviation=0.2):
    return mean + deviation * np.random.default_rng(0).standard_normal(count)


def test_a_jump_is_a_spike_and_ordinary_noise_is_not():
    values = noisy(200)
    values[[60, 150]] += 3.0
    assert verdicts(Guard(spike=Spike(window=32)), values)[0] == [60, 150]
    assert verdicts(Guard(), values)[0] == []


def test_the_first_losses_a_falling_loss_and_a_plateau_are_no_spikes():
    guard = Guard(spike=Spike())
    assert verdicts(guard, [1.0, 50.0, 1.0, 90.0])[0] == []                          # too little is known to judge
    assert verdicts(guard, 10 * np.exp(-np.arange(300) / 40))[0] == []
    assert verdicts(guard, [2.0] * 150 + [2.02, 1.98, 2.1])[0] == []                 # no spread at all, and a change of 5 %
    assert verdicts(guard, [2.0] * 20 + [3.0])[0] == [20]
    assert verdicts(Guard(spike=Spike(window=4, sigmas=3)), [2.0] * 4 + [9.0])[0] == [4]


def test_rejected_losses_do_not_enter_the_window():
    values = [2.0] * 40
    values[20], values[25] = 100.0, float("nan")
    rejected, state = verdicts(Guard(spike=Spike(window=16)), values)
    assert rejected == [20, 25]
    assert float(state["losses"].max()) == 2.0 and int(state["taken"]) == 38 and int(state["skipped"]) == 2 and int(state["in_a_row"]) == 0
    rejected, state = verdicts(Guard(), [1.0, float("inf"), float("nan")])
    assert rejected == [1, 2] and int(state["in_a_row"]) == 2
    assert verdicts(Guard(), [1.0], norm=float("nan"))[0] == [0]


@pytest.mark.parametrize("section, message", [
    (dict(nonfinite="ignore"), 'guard.nonfinite is \'ignore\'.*"stop" or "skip"'),
    (dict(spike=dict(sigma=3)), "guard.spike.sigma.*Did you mean"),
    (dict(spike=6), "guard.spike is 6.*mapping"),
    (dict(spike=dict(action="halt")), "guard.spike.action is 'halt'"),
    (dict(spike=dict(window=1)), "guard.spike.window is 1"),
    (dict(spike=dict(sigmas=0)), "guard.spike.sigmas is 0"),
    (dict(in_a_row=0), "guard.in_a_row is 0"),
    (dict(nan="skip"), "guard.nan"),
])
def test_sections_that_cannot_work(section, message):
    with pytest.raises(ConfigError, match=message):
        read_guard(section)
    with pytest.raises(ConfigError, match=message):
        resolve(shapes(guard=section))


def facts(finite=True, spike=False, in_a_row=1):
    return dict(finite=finite, spike=spike, in_a_row=in_a_row, skipped=in_a_row, loss=np.float32("nan" if not finite else 9), gradient_norm=np.float32(1))


def test_evidence(tmp_path, capsys):
    evidence = Evidence(Guard(nonfinite="skip", spike=Spike(action="stop"), in_a_row=3), tmp_path)
    batch = {"pairs": {"example_id": np.array([4, 2, -1])}}
    evidence.examine(1, facts(), batch)
    assert not read_events(tmp_path)
    evidence.examine(5, facts(finite=False), batch)
    evidence.examine(5, facts(finite=False), batch)     # again, after a resume
    evidence.examine(6, facts(finite=False, in_a_row=2), batch)
    assert "step 6: loss nan" in capsys.readouterr().out
    with pytest.raises(DivergedError, match="step 7: .*3th step in a row.*diverged.json"):
        evidence.examine(7, facts(finite=False, in_a_row=3), batch)
    with pytest.raises(DivergedError, match="step 9: loss 9 is a spike"):
        evidence.examine(9, facts(spike=True), batch)
    events = json.loads((tmp_path / "diverged.json").read_text())
    assert [(event["step"], event["kind"], event["action"]) for event in events] == [
        (5, "nonfinite", "skip"), (6, "nonfinite", "skip"), (7, "nonfinite", "stop"), (9, "spike", "stop")]
    assert events[0]["example_id"] == {"pairs": [4, 2]} and events[0]["loss"] == "nan"


def test_evidence_that_cannot_be_written_is_printed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    evidence = Evidence(Guard(nonfinite="skip"), tmp_path / "file")
    evidence.examine(5, facts(finite=False), {"pairs": {"example_id": np.array([17])}})
    assert "cannot be written" in (out := capsys.readouterr().out) and '"pairs": [17]' in out


def test_a_rejected_step_leaves_no_trace():
    """Parameters, moments and their counters, moving average and task state equal those of a run without the batch, bit for bit."""
    config = shapes(guard=dict(nonfinite="skip", spike=dict(window=8)))
    config["stages"][0].update(optimizer=dict(name="adamw", weight_decay=0.1), ema=dict(decay=0.9, warmup=True), steps=8)
    config = resolve(config)
    parts = setup.build(config, 0, setup.read(config), jax.devices()[:1])
    batches = parts.batches(0)
    good = [put_batch(next(batches), parts.mesh) for _ in range(3)]
    poisoned = {"pairs": {**good[2]["pairs"], "image": good[2]["pairs"]["image"] * jnp.nan}}

    def run(numbers):
        state = parts.initial_state()
        for number in numbers:
            state, metrics = parts.step(state, poisoned if number == 2 else good[number % 2], np.int32(number))
        return jax.device_get(state), jax.device_get(metrics)

    (with_it, metrics), (without, _) = run([0, 1, 2, 3]), run([0, 1, 3])
    ours, expected = flatten(with_it), flatten(without)
    assert set(ours) == set(expected) and {"guard/losses", "ema/logit_scale"} <= set(ours)
    for path in sorted(set(ours) - {"guard/skipped"}):
        np.testing.assert_array_equal(ours[path], expected[path], err_msg=path)
    assert int(ours["guard/skipped"]) == int(metrics["skipped"]) == 1 and int(ours["guard/taken"]) == 3


def test_a_run_skips_counts_and_resumes_as_the_undisturbed_one(tmp_path, monkeypatch):
    config = shapes(guard=dict(nonfinite="skip"))

    def start(workdir, plan, **overrides):
        monkeypatch.setattr(faults, "_plan", faults._read(plan))
        faults._counts.clear()
        return train({**config, **overrides}, workdir, devices=jax.devices()[:1])
    start(tmp_path / "whole", "loop.batch:1=nan,loop.batch:3=nan")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "whole")}
    assert [rows[step]["skipped"] for step in (1, 2, 3, 4)] == [1, 1, 2, 2] and rows[3]["gradient_norm"] is None
    assert [event["step"] for event in read_events(tmp_path / "whole")] == [1, 3]

    stopped = {"guard": dict(nonfinite="skip", in_a_row=1)}
    with pytest.raises(DivergedError, match="step 3"):
        start(tmp_path / "run", "loop.batch:3=nan", guard=dict(nonfinite="stop"))
    assert 'left out' in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(DivergedError, match="the 1th step"):
        start(tmp_path / "run", "loop.batch:1=nan", **stopped)
    assert losses(tmp_path / "run").keys() == {1, 2}       # the bad step is in no checkpoint and in no row
    start(tmp_path / "run", "loop.batch:1=nan")
    start(tmp_path / "straight", "loop.batch:3=nan")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
