import json

import numpy as np
import pytest

from experiments.results import hardware, rounded, write_results


def test_results_hold_what_a_reader_needs(tmp_path):
    metrics = {"ratio": 1.234567, "count": 20013, "counted": np.float64(123457.0)}
    path = write_results(tmp_path / "my_study", metrics, seeds=(0, 1), table=np.array([1.00009, 2.0]), batch=np.int64(4))
    results = json.loads(path.read_text())
    assert set(results) == {"name", "command", "hardware", "date", "seeds", "metrics", "details"}
    assert results["name"] == "my_study" and results["seeds"] == [0, 1]
    assert results["metrics"] == {"ratio": 1.235, "count": 20013, "counted": 123457}, "counts are exact"
    assert results["details"] == {"table": [1.0, 2.0], "batch": 4}
    assert results["hardware"]["cores"] >= 1 and results["hardware"]["cpu"]
    assert results["command"].startswith("python ")
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ratio"):
        write_results(tmp_path, {"ratio": float("nan")})
    assert not list(tmp_path.iterdir())


def test_rounding_keeps_four_digits_of_small_and_large_numbers():
    assert rounded({"a": 0.000123456, "b": (123456.7, np.float32(0.5))}) == {"a": 0.0001235, "b": [123500.0, 0.5]}
    assert rounded([2**60 + 1, np.int64(123457), -123457.0, np.float32(123457), 1e20 + 1]) == [2**60 + 1, 123457, -123457.0, 123457.0, 1e20]
    assert rounded([float("inf"), np.float32("nan"), True, np.bool_(False)]) == [None, None, True, False]
    assert set(hardware()) >= {"cpu", "cores", "python"}
