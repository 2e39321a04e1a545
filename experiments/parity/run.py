"""Compares every family with transformers on random configurations, in float32 and bfloat16, and greedy answers of language models token for token.

    python -m experiments.parity.run
"""
import argparse
import json
import os
from pathlib import Path
import sys
import tempfile

FOLDER = Path(__file__).parent
COUNT, GREEDY_COUNT = 12, 3


def main(families: str = "", count: int = COUNT, greedy_count: int = GREEDY_COUNT, notes: str = "") -> dict[str, float]:
    """Runs `count` configurations of each family (of the first `greedy_count` of a language family also answers) and writes results.json; returns its metrics.

    Args:
      families: names, separated by commas; all by default.
      notes: a file that keeps what was measured, so that an interrupted run goes on.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Programs are compiled once and run once: what they compute counts, not how fast.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    import torch
    import transformers

    from experiments.parity.compare import FAMILIES, compare, sample
    from experiments.parity.configurations import FAMILIES as LANGUAGE
    from experiments.parity.greedy import ANSWERING, greedy
    from experiments.results import write_results
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    done = {}
    if notes and os.path.exists(notes):
        done = {(line["family"], line["seed"]): line for line in map(json.loads, Path(notes).read_text().splitlines())}
    table: dict[str, list] = {}
    for seed in range(count):
        for name in families.split(",") if families else FAMILIES:
            line = done.get((name, seed))
            if line is None:
                answers = greedy if name in (*LANGUAGE, *ANSWERING) and seed < greedy_count else None
                with tempfile.TemporaryDirectory() as folder:
                    line = {"family": name, "seed": seed, **compare(sample(name, seed), folder, also=answers)}
                if notes:
                    with open(notes, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            table.setdefault(name, []).append(line)
            print({key: f"{value:.2g}" if isinstance(value, float) else value for key, value in line.items()}, flush=True)
    metrics = summary(table)
    shown = f"python -m experiments.parity.run{f' --families {families}' if families else ''} --count {count} --greedy_count {greedy_count}"
    write_results(FOLDER, metrics, command=shown, seeds=tuple(range(count)), hardware={"torch": torch.__version__, "transformers": transformers.__version__},
                  rows={name: [{key: value for key, value in line.items() if key != "family"} for line in lines] for name, lines in table.items()})
    return metrics


def summary(table: dict[str, list]) -> dict[str, float]:
    """Per family the largest figures over its configurations, and their number."""
    metrics = {}
    for name, lines in table.items():
        metrics[f"{name}_configurations"] = len(lines)
        metrics[f"{name}_float32_error"] = max(line["float32"] for line in lines)
        metrics[f"{name}_export_error"] = max(line["export"] for line in lines)
        metrics[f"{name}_round_trips_exact"] = sum(line["round_trip"] for line in lines)
        metrics[f"{name}_bfloat16_error"] = max(line["bfloat16"] for line in lines)
        metrics[f"{name}_reference_bfloat16_error"] = max(line["reference_bfloat16"] for line in lines)
        metrics[f"{name}_bfloat16_over_reference"] = sum(line["bfloat16"] for line in lines) / sum(line["reference_bfloat16"] for line in lines)
        metrics[f"{name}_bfloat16_above_1_5"] = sum(line["bfloat16"] > 1.5 * line["reference_bfloat16"] for line in lines)
        answers = [line for line in lines if "greedy_equal" in line]
        if answers:
            metrics[f"{name}_greedy_tokens"] = sum(line["greedy_tokens"] for line in answers)
            metrics[f"{name}_greedy_unequal"] = sum(not line["greedy_equal"] for line in answers)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default="", help="names, separated by commas; all by default")
    parser.add_argument("--count", type=int, default=COUNT, help="configurations of each family")
    parser.add_argument("--greedy_count", type=int, default=GREEDY_COUNT, help="of how many of a language family the answers are compared")
    parser.add_argument("--notes", default="", help="a file that keeps what was measured, so that an interrupted run goes on")
    main(**vars(parser.parse_args()))
    sys.exit(0)
