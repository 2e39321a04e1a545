"""The bfloat16 error of a few configurations over many draws of weights and tokens: one draw's ratio of two largest errors scatters.

    python -m experiments.parity.draws                              # writes draws/results.json
    python -m experiments.parity.draws --cases gpt2:8,t5:6 --draws 8 --output FOLDER
"""
import argparse
import dataclasses
import os
from pathlib import Path
import tempfile

OUTPUT = Path(__file__).parent / "draws"

CASES = "gpt2:8,bert_base:7,bert_base:8,llama:4,phi:3,gemma2:3,gemma2:9,t5:6,gemma3:3,gemma3:7"   # above 1.5 before sums were kept in float32


def main(cases: str = CASES, draws: int = 8, output: str | os.PathLike = OUTPUT) -> dict[str, list[float]]:
    """Prints, records and returns by case our bfloat16 error over the reference's own. The first draw is the configuration as `run.py` has it.

    Args:
      cases: "family:number", separated by commas.
      output: the folder of the results.json.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    import numpy as np
    import torch
    import transformers

    from experiments.parity.compare import compare, sample
    from experiments.results import write_results
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    ratios: dict[str, list[float]] = {}
    for case in cases.split(","):
        family, number = case.split(":")
        drawn = sample(family, int(number))
        for draw in range(draws):
            again = dataclasses.replace(drawn, seed=drawn.seed + 1000 * draw)
            with tempfile.TemporaryDirectory() as folder:
                found = compare(again, folder, dtypes=("bfloat16",))
            ratios.setdefault(case, []).append(found["bfloat16"] / found["reference_bfloat16"])
        print(case, "median", f"{np.median(ratios[case]):.2f}", "draws", " ".join(f"{ratio:.2f}" for ratio in ratios[case]), flush=True)
    every = np.concatenate(list(ratios.values()))
    print(f"{every.size} draws: median {np.median(every):.2f}, largest {every.max():.2f}, above 1.5: {(every > 1.5).sum()}")
    metrics = {"draws": every.size, "median": np.median(every), "largest": every.max(), "above_1_5": (every > 1.5).sum()}
    write_results(output, metrics, name="parity_draws", seeds=tuple(range(draws)), ratios=ratios,
                  hardware={"torch": torch.__version__, "transformers": transformers.__version__})
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=CASES, help='"family:number", separated by commas')
    parser.add_argument("--draws", type=int, default=8, help="of weights and tokens, for each case")
    parser.add_argument("--output", default=OUTPUT, help="the folder of the results.json")
    main(**vars(parser.parse_args()))
