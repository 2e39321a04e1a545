"""The benchmark of Flamingo at its tiny size: the peers are one model, both learn, and a cached context changes no answer."""
import pytest

from experiments.bench_flamingo.run import SIZES, jax_worker, torch_worker


@pytest.mark.slow
def test_both_train_the_same_parts_of_the_same_model():
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    size = SIZES["test"]
    ours, facts = jax_worker(size)
    theirs, peer = torch_worker(size, "eager")
    assert (facts["trained"], facts["frozen"]) == (peer["trained"], peer["frozen"]) and facts["same_answer"]
    for functions, found in ((ours, facts), (theirs, peer)):
        for _ in range(3):
            functions["train"]()
        assert found["losses"][2] < found["losses"][0]
    assert set(ours) == {"train", "cached_query", "re_encoded_query"} and len(ours["cached_query"]()[0]) == size["answer"]


@pytest.mark.slow
def test_writes_its_figures(tmp_path):
    pytest.importorskip("transformers")
    from experiments.bench_flamingo.run import main
    metrics = main("test", 1, tmp_path)
    assert metrics["train_time_over_torch"] > 0 and metrics["cached_query_time_over_reencoding"] > 0 and (tmp_path / "results.json").exists()
