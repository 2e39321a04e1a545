"""The loader's stream is a pure function of (seed, number), and bad records neither stop nor poison it."""
import io
import os
from pathlib import Path
import subprocess
import sys
import textwrap
import time

import numpy as np
from PIL import Image
import pytest

from vlm_jax.data.loader import Loader
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import ArraySource
from vlm_jax.errors import ConfigError, DataError


class Numbers:
    """Record i is i; those in `bad` cannot be read."""
    name = "numbers"

    def __init__(self, length, bad=()):
        self._length, self._bad = length, frozenset(bad)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if index in self._bad:
            raise problem("image_corrupt" if index % 2 else "caption_empty", f"{self.describe(index)}: it is broken; mend it.")
        return {"number": index}

    def describe(self, index):
        return f"line {index + 1}"


def process(record, rng=None):
    noise = 0.0 if rng is None else rng.random()
    return {"image": np.full((2, 3), record["number"] + noise, np.float32), "tokens": np.array([record["number"]], np.int32)}


def take(loader, count=None, start=0):
    batches = []
    for batch in loader.batches(start):
        batches.append(batch)
        if len(batches) == count:
            break
    return batches


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_shapes_and_dtypes_of_the_contract():
    batch, = take(Loader(Numbers(7), process, 4, seed=0), 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((4, 2, 3), "float32"),
        "tokens": ((4, 1), "int32"), "mask": ((4,), "bool"), "weight": ((4,), "float32"), "example_id": ((4,), "int64")}
    np.testing.assert_array_equal(batch["tokens"][:, 0], batch["example_id"])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_the_stream_does_not_depend_on_threads(threads):
    reference = take(Loader(Numbers(11, bad=[3]), process, 4, seed=5, threads=2, bad_budget=1), 9)
    assert_same(reference, take(Loader(Numbers(11, bad=[3]), process, 4, seed=5, threads=threads, bad_budget=1, prefetch=3), 9))


def test_the_stream_does_not_depend_on_worker_processes_and_their_bad_records_count():
    settings = dict(seed=5, bad_budget=1, threads=1)
    here, there = (Loader(Numbers(11, bad=[3, 4]), process, 4, workers=workers, **settings) for workers in (0, 2))
    assert_same(take(here, 8, start=3), take(there, 8, start=3))
    assert there.bad == here.bad and set(there.bad) == {"image_corrupt", "caption_empty"}


def test_another_seed_gives_another_order_and_other_noise():
    first, second = (np.concatenate([b["image"][:, 0, 0] for b in take(Loader(Numbers(64), process, 16, seed=seed), 4)]) for seed in (0, 1))
    assert not np.array_equal(np.floor(first), np.floor(second)) and not set(first % 1) & set(second % 1)


def test_a_run_that_resumes_sees_the_same_batches():
    loader = Loader(Numbers(10), process, 4, seed=3)
    assert_same(take(loader, 12)[7:], take(loader, 5, start=7))


def test_each_epoch_has_every_example_once_in_a_new_order_with_new_noise():
    batches = take(Loader(Numbers(12), process, 8, seed=0), 3)
    ids = np.concatenate([b["example_id"] for b in batches]).reshape(2, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in ids.tolist()) and not np.array_equal(ids[0], ids[1])
    noise = np.concatenate([b["image"][:, 0, 0] for b in batches]) % 1
    assert len(set(noise.tolist())) == 24


def test_parts_concatenate_to_the_whole_batch():
    whole = take(Loader(Numbers(11, bad=[2]), process, 6, seed=1, bad_budget=1), 4)
    parts = [take(Loader(Numbers(11, bad=[2]), process, 6, seed=1, bad_budget=1, part=(k, 3)), 4) for k in range(3)]
    assert_same(whole, [{key: np.concatenate([part[key] for part in row]) for key in row[0]} for row in zip(*parts)])


@pytest.mark.parametrize("size, parts", [(5, 3), (2, 3), (7, 2)])
def test_parts_that_do_not_divide_are_padded_at_the_end(size, parts):
    whole = take(Loader(Numbers(11), process, size, seed=1), 3)
    rows = [take(Loader(Numbers(11), process, size, seed=1, part=(k, parts)), 3) for k in range(parts)]
    joined = [{key: np.concatenate([part[key] for part in row]) for key in row[0]} for row in zip(*rows)]
    assert all(len(batch["mask"]) == -(-size // parts) * parts for batch in joined)
    assert all((batch["example_id"][size:] == -1).all() and not batch["weight"][size:].any() and not batch["image"][size:].any() for batch in joined)
    assert_same(whole, [{key: value[:size] for key, value in batch.items()} for batch in joined])


@pytest.mark.parametrize("length, size, parts", [(10, 4, 1), (3, 8, 1), (8, 4, 1), (9, 8, 4)])
def test_one_pass_pads_the_last_batch_and_gives_every_example_exactly_once(length, size, parts):
    settings = dict(seed=0, shuffle=False, repeat=False, drop_remainder=False)
    rows = [list(Loader(Numbers(length), process, size, part=(k, parts), **settings).batches()) for k in range(parts)]
    batches = [{key: np.concatenate([part[key] for part in row]) for key in row[0]} for row in zip(*rows)]
    assert len(batches) == len(Loader(Numbers(length), process, size, **settings)) == -(-length // size)
    ids, mask = (np.concatenate([b[key] for b in batches]) for key in ("example_id", "mask"))
    assert ids[mask].tolist() == list(range(length)) and (ids[~mask] == -1).all()
    np.testing.assert_array_equal(np.concatenate([b["weight"] for b in batches]), mask.astype(np.float32))
    assert all(not b["image"][~b["mask"]].any() and b["image"].shape[0] == size for b in batches)
    assert (np.concatenate([b["image"][:, 0, 0] for b in batches])[mask] % 1 == 0).all(), "an evaluation order is without randomness"


def test_one_pass_may_drop_the_remainder_and_ends_where_it_started_late():
    loader = Loader(Numbers(10), process, 4, repeat=False, drop_remainder=True)
    assert len(take(loader)) == len(loader) == 2
    assert take(loader, start=2) == [] and len(take(loader, start=1)) == 1


def test_a_bad_record_keeps_its_place_with_weight_0():
    loader = Loader(Numbers(6, bad=[1, 4]), process, 3, shuffle=False, repeat=False, bad_budget=1)
    batches = take(loader)
    assert [b["example_id"].tolist() for b in batches] == [[0, 1, 2], [3, 4, 5]]
    assert [b["weight"].tolist() for b in batches] == [[1, 0, 1], [1, 0, 1]] and not batches[0]["mask"][1]
    assert not batches[0]["image"][1].any()
    assert loader.bad == {"image_corrupt": 1, "caption_empty": 1}
    assert loader.bad_examples[0] == "numbers[1] (line 2): it is broken; mend it."


@pytest.mark.parametrize("workers", [0, 1])
def test_raise_names_source_index_and_cause(workers):
    loader = Loader(Numbers(6, bad=[4]), process, 3, shuffle=False, repeat=False, on_bad="raise", workers=workers)
    with pytest.raises(DataError, match=r"numbers\[4\] \(line 5\): it is broken; mend it\."):
        take(loader)


def test_more_bad_records_than_the_budget_stop_the_run():
    loader = Loader(Numbers(100, bad=range(0, 100, 5)), process, 10, seed=0, bad_budget=0.1)
    with pytest.raises(DataError, match="bad_budget 0.1 .*caption_empty.*first: numbers") as caught:
        take(loader, 50)
    assert caught.value.exit_code == 65 and sum(loader.bad.values()) > 10
    assert len(take(Loader(Numbers(100, bad=range(0, 100, 5)), process, 10, seed=0, bad_budget=0.3), 50)) == 50


def test_a_budget_of_nothing_stops_at_the_first_and_a_small_one_after_ten():
    with pytest.raises(DataError, match="1 of the last"):
        take(Loader(Numbers(1000, bad=[7]), process, 10, bad_budget=0), 200)
    loader = Loader(Numbers(1000, bad=[7]), process, 10)
    with pytest.raises(DataError, match="11 of the last"):
        take(Loader(Numbers(100, bad=[7]), process, 10), 200)
    assert len(take(loader, 200)) == 200 and loader.bad == {"image_corrupt": 2}


def test_a_first_batch_without_one_good_record_stops_the_run():
    with pytest.raises(DataError, match="4 of the last 4"):
        take(Loader(Numbers(8, bad=range(8)), process, 4))
    batch = take(Loader(Numbers(8, bad=range(4)), process, 4, shuffle=False, bad_budget=1), 1)[0]
    assert batch["image"].shape == (4, 2, 3) and not batch["weight"].any()


def test_a_record_of_another_shape_is_a_fault_of_the_processor():
    def uneven(record, rng=None):
        return {"image": np.zeros(1 + record["number"] % 2, np.float32)}
    with pytest.raises(ConfigError, match="image of line .* has shape"):
        take(Loader(Numbers(4), uneven, 4), 1)


@pytest.mark.parametrize("settings, message", [
    (dict(batch_size=0), "batch_size"), (dict(batch_size=4, seed=-1), "seed"), (dict(batch_size=4, on_bad="ignore"), "on_bad"),
    (dict(batch_size=4, part=(2, 2)), "part"),
    (dict(batch_size=4, threads=-1), "threads"),
    (dict(batch_size=4, bad_budget=2), "bad_budget"), (dict(batch_size=40, repeat=False), "make no batch"),
    (dict(batch_size=1, workers=1.5), "workers")])
def test_arguments_that_cannot_work_are_named(settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        Loader(Numbers(10), process, **settings)


def test_pictures_through_the_real_processor():
    from vlm_jax.data.processor import Processor
    images = []
    for i in range(5):
        stream = io.BytesIO()
        Image.fromarray(np.full((20 + i, 30, 3), 40 * i, np.uint8)).save(stream, "PNG")
        images.append(stream.getvalue())
    images[3] = images[3][:40]
    source = ArraySource(images, ["a", "b", "c", "d", "e"])
    processor = Processor(image=[["resize", {"size": 8}], ["value_range", {"low": -1, "high": 1}]])
    loader = Loader(source, processor, 4, shuffle=False, repeat=False, drop_remainder=False, bad_budget=1)
    first, second = take(loader)
    assert first["image"].shape == (4, 8, 8, 3) and first["mask"].tolist() == [True, True, True, False] and sum(loader.bad.values()) == 1
    np.testing.assert_allclose(first["image"][1], 40 / 127.5 - 1, atol=1e-6)
    assert second["mask"].tolist() == [True, False, False, False]


def test_importing_the_loader_imports_neither_grain_nor_jax():
    code = textwrap.dedent("""
        import sys
        import vlm_jax.data.loader, vlm_jax.data.sources, vlm_jax.data.tables, vlm_jax.data.tar_shards
        import vlm_jax.data.parquet_source, vlm_jax.data.tfds_source, vlm_jax.data.prepare
        heavy = [m for m in ("grain", "jax", "torch", "tensorflow", "tensorflow_datasets", "pyarrow", "orbax") if m in sys.modules]
        assert not heavy, heavy
    """)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/shm and /proc are Linux's")
def test_a_killed_trainer_leaves_neither_workers_nor_shared_memory(tmp_path):
    prefix = f"t{os.getpid() % 100_000}_"
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(f"""
        import multiprocessing, time
        from multiprocessing import shared_memory
        from tests.data.test_loader import Loader, Numbers, process
        shared_memory._SHM_NAME_PREFIX = "/{prefix}"     # to tell it from that of others; workers run this line too
        if __name__ == "__main__":
            for batch in Loader(Numbers(64), process, 4, workers=2, threads=1).batches():
                print(*[child.pid for child in multiprocessing.active_children()], flush=True)
                time.sleep(60)
    """))
    root = str(Path(__file__).parents[2])
    trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env={**os.environ, "PYTHONPATH": root})

    def memory():
        return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]
    try:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert memory()
    finally:
        trainer.kill()
        trainer.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while (memory() or any(running(pid) for pid in workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in workers) and memory() == []


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
