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
    command_line.add_process_flags(parser)
    options, overrides = command_line.parse(parser, arguments)
    command_line.start_processes(options)

    from vlm_jax import distributed
    from vlm_jax.restore import load
    from vlm_jax.training.config import apply_overrides, load_config, resolve
    from vlm_jax.training.evaluators import evaluate_all, print_metrics
    loaded = load(options.workdir, step=options.checkpoint)
    config = loaded.config
    if options.config:
        config = resolve(apply_overrides(load_config(options.config), overrides))
    elif overrides:
        config = resolve(apply_overrides(config, overrides))
    distributed.check_same("evaluation", {"evaluations": config["evaluations"], "step": loaded.step, "only": options.only})
    results = evaluate_all(config["evaluations"], loaded.predictor(mesh=_mesh_of_all()), options.workdir, loaded.step, only=options.only)
    for name, metrics in results.items():
        print_metrics(name, loaded.step, metrics)
    from vlm_jax.training.report import write_report
    print(f"report: {write_report(options.workdir)}")
    return results


def _mesh_of_all():
    """The mesh of all devices where several processes share the examples; None, one device, in one process."""
    import jax
    if jax.process_count() == 1:
        return None
    from vlm_jax.sharding.mesh import make_mesh
    return make_mesh()


if __name__ == "__main__":
    command_line.main(run)
