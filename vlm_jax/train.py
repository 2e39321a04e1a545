"""Trains an experiment config: `python -m vlm_jax.train --config configs/siglip/emoji.py --workdir runs/emoji`.

The same command again resumes. `--config.a.b=v` overrides a value; `--dry_run` prints shapes, parameters, shardings and the bytes of the state, and
trains nothing.
"""
import argparse
from collections.abc import Sequence

from vlm_jax import command_line


def run(arguments: Sequence[str] | None = None) -> dict:
    """Parses the command line and trains; returns the summary of `vlm_jax.training.loop.train`."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.train", description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="Any value of the config: --config.seed=1 --config.stages.0.steps=100")
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the config file, with its argument after a colon")
    parser.add_argument("--workdir", metavar="DIR", help="where checkpoints, metrics and the report go (needed unless --dry_run)")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, without running it")
    parser.add_argument("--print_config", action="store_true", help="print the resolved config as JSON and stop")
    parser.add_argument("--profile", metavar="FROM-TO", help="write a profiler trace of these steps into the workdir, e.g. 10-13")
    command_line.add_process_flags(parser)
    options, overrides = command_line.parse(parser, arguments)

    from vlm_jax import distributed
    from vlm_jax.training.config import apply_overrides, load_config, resolve
    if not options.workdir and not (options.dry_run or options.print_config):
        parser.error("--workdir is needed to train; add --workdir runs/NAME, or --dry_run")
    if not (options.dry_run or options.print_config):
        command_line.start_processes(options)
    config = apply_overrides(load_config(options.config), overrides)
    if options.print_config:
        import json
        print(json.dumps(resolve(config), indent=2))
        return {}
    if options.dry_run:
        from vlm_jax.training.dry_run import dry_run
        print(dry_run(config))
        return {}
    distributed.check_same("config", resolve(config))
    distributed.check_same("command", {"workdir": options.workdir, "profile": options.profile})
    from vlm_jax.training.loop import train
    return train(config, options.workdir, profile=options.profile)


if __name__ == "__main__":
    command_line.main(run)
