"""The quickstart: `python -m vlm_jax.demo` trains a small SigLIP on emoji, evaluates it on pictures it never saw, and writes a report.

Where the emoji font is missing it says how to get it and trains on drawn shapes instead. The same command resumes.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
import time

from vlm_jax import command_line

HEADLINES = {   # evaluation -> metrics shown at the end, with the words for a reader
    "heldout_attributes": [("text_to_image/r@1", "the right picture is first"), ("text_to_image/r@5", "among the first five"),
                           ("image_to_text/r@1", "the right name is first")],
    "heldout_pairs": [("top1", "the right one of 100 classes is first"), ("top5", "among the first five")],
}


def run(arguments: Sequence[str] | None = None) -> dict:
    """Parses the command line, trains and prints the headline figures; returns the summary of training."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.demo", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workdir", default="runs/demo", metavar="DIR", help="default: runs/demo")
    parser.add_argument("--variant", default="full", choices=["full", "test"], help="test: two steps, to see that everything works")
    parser.add_argument("--steps", type=int, metavar="N", help="train for N steps instead of the config's")
    options, overrides = command_line.parse(parser, arguments)

    from vlm_jax.data.worlds.emoji_font import emoji_ready
    from vlm_jax.training.config import apply_overrides, load_config
    from vlm_jax.training.loop import train
    started = time.perf_counter()
    missing = emoji_ready()
    family = "shapes" if missing else "emoji"
    if missing:
        print(f"The emoji data cannot be drawn here: {missing}\nTraining on drawn shapes instead.", flush=True)
    workdir = options.workdir if not missing else f"{options.workdir.rstrip('/')}_shapes"
    argument = f"variant={options.variant}" + (f",steps={options.steps}" if options.steps else "")
    config = apply_overrides(load_config(f"configs/siglip/{family}.py:{argument}"), overrides)
    summary = train(config, workdir)

    print(f"\nTrained and evaluated in {time.perf_counter() - started:.0f} s on a machine of {summary['machine_gflops']:.0f} GFLOP/s"
          f" (float32 matrix products, measured).")
    for evaluation, metrics in summary["evaluations"].items():
        for metric, words in HEADLINES.get(evaluation, []):
            print(f"  {evaluation}: {words} for {100 * metrics[metric]:.1f} % of the queries ({metric})")
    print(f"Open {Path(summary['report']).resolve().as_uri()} in a browser.")
    return summary


if __name__ == "__main__":
    command_line.main(run)
