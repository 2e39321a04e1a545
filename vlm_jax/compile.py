"""Compiles a config's programs ahead of time, for hardware that need not be there: does it fit, what does it send, how fast can it be.

    python -m vlm_jax.compile --config configs/siglip/so400m14_webli.py --topology v5e-256
    python -m vlm_jax.compile --config configs/siglip/emoji.py --topology local --what train,evaluate --json emoji.json
    python -m vlm_jax.compile --config configs/paligemma/paligemma_3b.py --topology v5e-16 --what train,generate

Needs libtpu for absent TPUs (pip install "jax[tpu]" or vlm_jax[tpu]); neither data nor tokenizer files.
"""
import argparse
from collections.abc import Sequence

from vlm_jax import command_line
from vlm_jax.errors import ConfigError


def run(arguments: Sequence[str] | None = None) -> list[dict]:
    """Parses the command line, compiles, prints one table a program; returns the findings of `analysis.report.analyse`."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.compile", description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="Any value of the config: --config.mesh.fsdp=8 --config.model.remat=full")
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the config file, with its argument after a colon")
    parser.add_argument("--topology", metavar="NAME", help="v5e-256, v5p:8x8x16, v5e:16x16*4, cpu-8, local; by default the config's, or local")
    parser.add_argument("--what", default="train", metavar="NAMES", help="train, evaluate, generate (of models that generate text), several with commas")
    parser.add_argument("--stage", type=int, default=1, help="the stage of the config, counted from 1")
    parser.add_argument("--batch", type=int, help="rows of a global batch, instead of the config's (of evaluate 64, of generate 16)")
    parser.add_argument("--quick", action="store_true", help="compile once; estimate what would take further programs")
    parser.add_argument("--json", metavar="FILE", help="write the findings there as well")
    options, overrides = command_line.parse(parser, arguments)

    from vlm_jax.analysis.report import analyse, table
    from vlm_jax.training.config import apply_overrides, load_config
    if options.batch is not None and options.batch < 1:
        raise ConfigError(f"--batch {options.batch}: give at least 1.")
    config = apply_overrides(load_config(options.config), overrides)
    topology = options.topology or config.get("topology") or "local"
    found = []
    for what in options.what.split(","):
        for one in analyse(config, topology, what.strip(), options.stage - 1, options.quick, options.batch):
            print(("\n" if found else "") + table(one), flush=True)
            found.append(one)
    if options.json:
        import json
        from pathlib import Path
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    command_line.main(run)
