"""Bytes that a chip sends in a training step of a 9B-parameter decoder against the number of chips, 8 to 1,024, at a fixed batch a chip: Gemma 2 for TPU v5p.

    python -m experiments.weak_scaling_decoder.run          # minutes a program on two quiet cores, resumable: done programs are kept
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.weak_scaling.run import run

CONFIGS = {"gemma2_9b": "configs/language/gemma2_9b.py"}
TOPOLOGIES = ("v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16")   # 8, 64, 256 and 1,024 chips; the state of 9B parameters does not fit 8 chips of v5e
ROWS = 2   # texts of 1,024 tokens a chip


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the topologies named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES))
    options = parser.parse_args(arguments)
    run(Path(__file__).parent, "python -m experiments.weak_scaling_decoder.run", CONFIGS, options.topologies, ROWS)


if __name__ == "__main__":
    main()
