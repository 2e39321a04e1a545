"""How much host memory loading takes beyond the parameters themselves, over the largest tensor of the files.

    python -m experiments.bench_load.run
"""
import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

FOLDER = Path(__file__).parent
# case -> (settings of a SigLIP, devices, dtype that is asked for, shard bytes of the files)
TOWER = dict(num_heads=8, scan=True)
CASES: dict[str, dict[str, Any]] = {
    "token_table_largest": dict(vocab=128_000, width=512, mlp=2048, depth=8, devices=1, dtype=None),
    "layers_largest_transposed": dict(vocab=1000, width=2048, mlp=8192, depth=6, devices=1, dtype=None),
    "layers_largest_8_devices_fsdp": dict(vocab=1000, width=2048, mlp=8192, depth=6, devices=8, dtype=None),
    "to_bfloat16": dict(vocab=64_000, width=1024, mlp=4096, depth=6, devices=1, dtype="bfloat16"),
}


def model_of(case: dict[str, Any]) -> Any:
    """The model of a case."""
    from vlm_jax import registry
    tower = dict(TOWER, width=case["width"], mlp_dim=case["mlp"], depth=case["depth"])
    return registry.build("siglip", image=dict(tower, image_size=64, patch_size=16, depth=1, mlp_dim=64, scan=True),
                          text=dict(tower, vocab_size=case["vocab"], length=16, embed_dim=case["width"]), embed_dim=case["width"])


def write(case: dict[str, Any], folder: Path) -> None:
    """Writes a directory of random weights, tensor by tensor."""
    import dataclasses

    import numpy as np

    from vlm_jax.interop.abstract import abstract_params
    from vlm_jax.interop.families import siglip
    from vlm_jax.interop.safetensors import write_folder
    from vlm_jax.interop.table import write as tensors_of
    model, rng = model_of(case), np.random.default_rng(0)
    # Shapes alone go through the table; the numbers are drawn when a tensor is written.
    blank = _blank(abstract_params(model))
    tensors = {name: dataclasses.replace(tensor, compute=lambda shape=tensor.shape: rng.random(shape, np.float32))
               for name, tensor in tensors_of(siglip.rows(model), blank).items()}
    write_folder(folder, tensors, shard_bytes=200_000_000)
    (folder / "config.json").write_text(json.dumps(siglip.to_config(model)))


def _blank(shapes: Any) -> Any:
    import jax
    import numpy as np
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)


def measure(name: str, folder: Path) -> dict[str, float]:
    """Loads the directory in this process; returns peak and final memory above what it had before, in bytes."""
    import gc

    import jax

    from vlm_jax.interop.directory import load_directory, open_directory, parameter_bytes
    from vlm_jax.interop.families import siglip
    from vlm_jax.interop.table import read
    from vlm_jax.sharding import make_mesh
    case = CASES[name]
    mesh = make_mesh(data=1, fsdp=case["devices"]) if case["devices"] > 1 else None
    source = open_directory(str(folder))[-1]
    largest = max(source.nbytes(tensor) for tensor in source.names())
    _warm_up(siglip, read)
    gc.collect()
    sampler = Sampler()
    start, before = time.perf_counter(), resident()
    loaded = load_directory(folder, dtype=case["dtype"], mesh=mesh)
    jax.block_until_ready(loaded.params)
    seconds = time.perf_counter() - start
    after, peak = resident(), sampler.stop()
    stored = parameter_bytes(loaded.params)
    return dict(largest_tensor=largest, parameters=stored, peak=peak - before, final=after - before, seconds=seconds,
                extra_peak_over_largest=(peak - before - stored) / largest, extra_final_over_largest=(after - before - stored) / largest)


def _warm_up(siglip: Any, read: Any) -> None:
    """Loads a tiny model first: libraries and the compiler's own memory are not the loader's."""
    import numpy as np

    from vlm_jax.interop.abstract import abstract_params
    from vlm_jax.interop.table import Arrays, write
    model = model_of(dict(vocab=8, width=16, mlp=8, depth=1))
    shapes = abstract_params(model)
    read(siglip.rows(model), Arrays({name: np.zeros(t.shape, t.dtype) for name, t in write(siglip.rows(model), _blank(shapes)).items()}), shapes)


def resident() -> int:
    """The memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Sampler:
    """The peak of `resident`, asked every millisecond, and the kernel's own high-water mark where it can be reset."""

    def __init__(self):
        self._peak, self._on = 0, True
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._marks = True
        except OSError:
            self._marks = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._on:
            self._peak = max(self._peak, resident())
            time.sleep(0.001)

    def stop(self) -> int:
        """Ends; returns the peak in bytes."""
        self._on = False
        self._thread.join()
        if self._marks:
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            self._peak = max(self._peak, int(line.split()[1]) * 1024)
        return self._peak


def main(names: list[str] | None = None) -> dict[str, float]:
    """Measures every case in a process of its own and writes results.json; returns its metrics."""
    from experiments.results import write_results
    found = {}
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            write(CASES[name], Path(folder))
            command = [sys.executable, "-m", "experiments.bench_load.run", "--case", name, "--folder", folder]
            flags = f"--xla_force_host_platform_device_count={CASES[name]['devices']}"
            import os
            child = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900,
                                   env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
            found[name] = json.loads(child.stdout.splitlines()[-1])
            print(name, found[name], flush=True)
    metrics = {"extra_peak_host_bytes_over_largest_tensor": max(case["extra_peak_over_largest"] for case in found.values())}
    if not names:
        write_results(FOLDER, metrics, cases=found, settings=CASES)
    print(metrics)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case")
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.case, Path(options.folder))))
    else:
        main([options.case] if options.case else None)
