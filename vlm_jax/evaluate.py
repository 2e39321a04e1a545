"""Evaluates a trained run: `python -m vlm_jax.evaluate --workdir runs/emoji`.

Model, preprocessing and evaluations come from the workdir's config.json, never from a stored .py. `--config` names another config whose evaluations are run
on the weights of the workdir; `--checkpoint` chooses a step.
"""
import argparse
from collections.abc import Sequence

from vlm_jax import command_line


def run(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Parses the command line, evaluates, prints the metrics; returns {evaluation: {metric: value}}."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.evaluate", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the trained run")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="take the evaluations from this config instead of the run's own")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the step to evaluate; default: the newest")
    parser.add_argument("--only", metavar="NAME", action="append", help="run this evaluation only (may be repeated)")
    options, overrides = command_line.parse(parser, arguments)

    from vlm_jax.restore import load
    from vlm_jax.training.config import apply_overrides, load_config, resolve
    from vlm_jax.training.evaluators import evaluate_all, print_metrics
    loaded = load(options.workdir, step=options.checkpoint)
    config = loaded.config
    if options.config:
        config = resolve(apply_overrides(load_config(options.config), overrides))
    elif overrides:
        config = resolve(apply_overrides(config, overrides))
    results = evaluate_all(config["evaluations"], loaded.predictor(), options.workdir, loaded.step, only=options.only)
    for name, metrics in results.items():
        print_metrics(name, loaded.step, metrics)
    from vlm_jax.training.report import write_report
    print(f"report: {write_report(options.workdir)}")
    return results


if __name__ == "__main__":
    command_line.main(run)
