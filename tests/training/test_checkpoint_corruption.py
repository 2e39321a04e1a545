"""Damaged checkpoints: never a silently different value. `python -m experiments.corruption.run` does the same to a training run, in hundreds of cases."""
import shutil

import jax
import numpy as np
import pytest

from experiments.corruption.cases import CRASHED, FELL_BACK, HARMLESS, REFUSED, UNDETECTED, damages, outcome
from tests.training.test_checkpoints import make_tree
from vlm_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corruption") / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 3):
            checkpoints.save(step, make_tree(step, width=40), {"step": step})
    return folder


def test_no_damage_is_undetected(saved, tmp_path):
    abstract = make_tree(width=40)
    sound = {step: jax.tree.map(np.asarray, make_tree(step, width=40)) for step in (1, 3)}
    results, wrong = {}, []
    for number, (name, damage) in enumerate(damages(saved, flips=1)):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damage(folder)
        results[name], said = outcome(folder, abstract, sound, lambda metadata: metadata["step"])
        if results[name] in (UNDETECTED, CRASHED):
            wrong.append(f"{name}: {results[name]}: {said}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert len(results) > 100
    assert results["delete 3/state/manifest.ocdbt"] == results["delete 3/meta/metadata"] == results["delete the folder of the step"] == FELL_BACK
    assert results["delete 3/commit_success.txt"] == results["copy state from the older step"] == FELL_BACK
    assert results["swap state of two steps"] == results["swap meta of two steps"] == REFUSED      # no step is sound
    assert results["an empty folder named like a step"] == results["delete 3/state/_METADATA"] == HARMLESS


def test_what_is_damaged_is_named(saved, tmp_path):
    sound = {step: jax.tree.map(np.asarray, make_tree(step, width=40)) for step in (1, 3)}
    cases = dict(damages(saved, flips=1))
    for name, words in {"delete 3/meta/metadata": "meta/metadata is missing", "metadata: a shape of 10^18": "does not match its checksum",
                        "metadata: another digest, checksum made to fit": "differ from their digest: ema/image/kernel",
                        "delete the folder of the step": "the last good checkpoint, step 3, is gone",
                        "a copy of the older step named like a step": "it is a copy of step 1"}.items():
        folder = tmp_path / "checkpoints"
        shutil.copytree(saved, folder)
        cases[name](folder)
        _, said = outcome(folder, make_tree(width=40), sound, lambda metadata: metadata["step"])
        assert words in said, (name, said)
        shutil.rmtree(folder)
