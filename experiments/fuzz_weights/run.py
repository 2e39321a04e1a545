"""Mutated safetensors headers and config.json files: every one is a clear error in one line or a sound model; bounded memory, no crash, no hang.

    python -m experiments.fuzz_weights.run
"""
from collections import Counter
from pathlib import Path
import resource
import signal
import tempfile
import time
from typing import Any

FOLDER = Path(__file__).parent
SECONDS = 10   # one file may take


def read_all(path: Path) -> None:
    """Reads every tensor of a file."""
    from vlm_jax.interop.safetensors import open_file
    file = open_file(path)
    for name in file.names():
        file.read(name)


def build_model(path: Path) -> None:
    """Everything that config.json decides before a tensor is read: settings, model, weight table."""
    from vlm_jax.interop import families
    from vlm_jax.interop.config_reader import read_config
    from vlm_jax.interop.directory import build
    config = read_config(str(path.parent), path.name)
    family = families.family(config.get("model_type"))
    model = build(family.to_settings(config))
    family.rows(model)


def outcome(function: Any, path: Path) -> str:
    """"loaded", "refused" (a VlmError in one line), or what went wrong."""
    from vlm_jax.errors import VlmError
    signal.alarm(SECONDS)
    try:
        function(path)
        return "loaded"
    except VlmError as error:
        message = str(error)
        return "refused" if "\n" not in message and len(message) < 1500 and message.isprintable() else f"unreadable: {message!a:.300}"
    except Exception as error:   # what a user cannot mend
        return f"crashed: {type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)


def sweep(count: int, seed: int, folder: Path) -> tuple[dict[str, Counter], list[str]]:
    """Outcomes of `count` files of each kind, and the bad ones."""
    from experiments.fuzz_weights.cases import configs, files
    from tests.interop.configs import CONFIGS
    found: dict[str, Counter] = {"headers": Counter(), "configs": Counter()}
    bad: list[str] = []
    signal.signal(signal.SIGALRM, _too_long)
    kinds = [("headers", read_all, "a.safetensors", files(count, seed)),
             *(("configs", build_model, "config.json", configs(base, -(-count // len(CONFIGS)), seed + k)) for k, base in enumerate(CONFIGS.values()))]
    for kind, function, name, contents in kinds:
        for number, content in enumerate(contents):
            (folder / name).write_bytes(content)
            result = outcome(function, folder / name)
            word = result.partition(":")[0]
            found[kind][word] += 1
            if word not in ("loaded", "refused"):
                bad.append(f"{kind} {number}: {result}: {content[:200]!a}")
    return found, bad


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"a file took more than {SECONDS} s")


def main(count: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Runs the sweep and writes results.json; returns its metrics."""
    from experiments.results import write_results
    import vlm_jax.interop.directory  # noqa: F401  its memory is not that of the files
    with tempfile.TemporaryDirectory() as folder:
        sweep(50, seed + 1, Path(folder))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        found, bad = sweep(count, seed, Path(folder))
        seconds, grown = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    metrics = {f"{kind}_{word}": found[kind][word] for kind in found for word in ("refused", "loaded", "crashed", "unreadable")}
    metrics |= {"cases": sum(sum(counts.values()) for counts in found.values()), "seconds": seconds, "extra_peak_bytes": grown * 1024}
    print(metrics, *bad[:20], sep="\n")
    write_results(FOLDER, metrics, seeds=(seed,), bad=bad)
    return metrics


if __name__ == "__main__":
    main()
