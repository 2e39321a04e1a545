"""Who is right where both differ? Our float32 and the reference's against the reference in float64, on a few configurations of language models.

    python -m experiments.parity.doubles                            # writes doubles/results.json
"""
import argparse
import os
from pathlib import Path
import tempfile

OUTPUT = Path(__file__).parent / "doubles"
CASES = "gemma3:9"   # above 1e-4 in run.py


def main(cases: str = CASES, output: str | os.PathLike = OUTPUT) -> dict[str, float]:
    """Prints, records and returns the relative errors, {"FAMILY_NUMBER_ours", "FAMILY_NUMBER_reference"}.

    The reference computes in float64 but for what its code casts to float32 itself (some norms, softmax, the tables of rotations).

    Args:
      cases: "family:number", separated by commas; families of language models.
      output: the folder of the results.json.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")   # as run.py
    import torch
    import transformers

    from experiments.parity import texts
    from experiments.parity.compare import reference, relative_error, sample
    from experiments.results import write_results
    from vlm_jax.interop.directory import load_directory
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    metrics: dict[str, float] = {}
    for case in cases.split(","):
        family, number = case.split(":")
        drawn = sample(family, int(number))
        model, inputs = reference(drawn), texts.batch(drawn)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            ours = texts.run_ours(load_directory(folder), drawn, inputs)
        single = texts.run_reference(model, drawn, inputs)
        double = texts.run_reference(model.double(), drawn, inputs)
        metrics |= {f"{family}_{number}_ours": relative_error(ours, double), f"{family}_{number}_reference": relative_error(single, double)}
        print(case, {key: f"{value:.2g}" for key, value in metrics.items()}, flush=True)
    write_results(output, metrics, name="parity_doubles", hardware={"torch": torch.__version__, "transformers": transformers.__version__})
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=CASES, help='"family:number", separated by commas')
    parser.add_argument("--output", default=OUTPUT, help="the folder of the results.json")
    main(**vars(parser.parse_args()))
