"""Writes the golden texts of all configs anew: `python -m tests.configs.regenerate` (or `make golden`). Read the diff before committing it."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from tests.configs.describe import GOLDEN, config_files, describe, golden_path  # noqa: E402  (the environment comes first)

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    kept = set()
    for file in config_files():
        golden_path(file).write_text(describe(file))
        kept.add(golden_path(file))
        print(golden_path(file).name)
    for stale in set(GOLDEN.glob("*.txt")) - kept:
        stale.unlink()
