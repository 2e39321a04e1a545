"""The loader's benchmark runs and both sides read the same pictures."""
import json

import numpy as np
import pytest

from experiments.bench_loader.run import TorchFiles, main, write_photographs


def test_the_small_benchmark_writes_its_results(tmp_path):
    pytest.importorskip("torch")
    main(["--small", "--output", str(tmp_path), "--workers", "0", "--threads", "1"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["name"] == "bench_loader" and set(results["details"]["medians"]) == {"ours threads=1", "torch workers=0"}
    assert all(results["metrics"][key] > 0 for key in ("images_per_second_over_torch", "images_per_second", "images_per_second_torch"))


def test_both_sides_give_the_same_pixels(tmp_path):
    pytest.importorskip("torch")
    from vlm_jax.data.processor import Processor
    names = write_photographs(tmp_path, 2, 40)
    processor = Processor(image=[["resize", {"size": 224, "method": "bilinear"}], ["value_range", {"low": -1, "high": 1}]])
    for index, name in enumerate(names):
        theirs = TorchFiles(tmp_path, names)[index].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(processor.image((tmp_path / name).read_bytes()), theirs, atol=1e-6)
