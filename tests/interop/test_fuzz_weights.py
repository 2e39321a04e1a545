"""Mutated headers and configs: each a clear error or a sound model. The quick part; experiments/fuzz_weights runs 10,000 of each."""
import resource

import pytest

from experiments.fuzz_weights.run import sweep


def check(count, seed, folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, bad = sweep(count, seed, folder)
    assert not bad, bad[0]
    for counts in found.values():
        assert sum(counts.values()) >= count and counts["refused"] > 0.2 * count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000   # kB


def test_a_thousand_of_each(tmp_path):
    check(1000, 0, tmp_path)


@pytest.mark.slow
def test_ten_thousand_of_each(tmp_path):
    check(10_000, 1, tmp_path)
