"""What the training studies share: run a config over seeds by the ordinary command, and read its final metrics."""
import os
from pathlib import Path
import subprocess
import sys

import numpy as np

from vlm_jax.errors import VlmError
from vlm_jax.sweep import final_metrics

ROOT = Path(__file__).resolve().parents[1]


def trained(config: str, workdir: Path, overrides: tuple[str, ...] = ()) -> dict[str, float]:
    """Trains `config` in `workdir` (or finishes an interrupted run there) and returns {"evaluation/metric": last value}.

    Raises:
      VlmError: if the training command fails.
    """
    environment = dict(os.environ, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")   # as `make demo` does
    command = [sys.executable, "-m", "vlm_jax.train", "--config", config, "--workdir", str(workdir), *(f"--config.{item}" for item in overrides)]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code:
        raise VlmError(f"{config} in {workdir} ended with exit code {code}; its last lines say why. The same command resumes.")
    return final_metrics(workdir)


def over_seeds(config: str, folder: Path, seeds: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Trains `config` once a seed in `folder/seed_N`; returns {seed: metrics}."""
    return {seed: trained(config, folder / f"seed_{seed}", (f"seed={seed}",)) for seed in seeds}


def mean(runs: dict[int, dict[str, float]], metric: str) -> float:
    """Returns the mean of a metric over the seeds."""
    return float(np.mean([run[metric] for run in runs.values()]))
