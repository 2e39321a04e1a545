"""Bytes that a chip sends in a training step against the number of chips, 8 to 1,024, at a fixed batch a chip: So400m/14 and g-opt/16 for TPU v5e.

    python -m experiments.weak_scaling.run                  # one to three minutes a program on two quiet cores, resumable: done programs are kept
"""
import argparse
from collections.abc import Mapping, Sequence
import json
from pathlib import Path

from experiments.results import write_results
from vlm_jax.analysis.report import analyse
from vlm_jax.sharding.topologies import parse_topology
from vlm_jax.training.config import load_config

CONFIGS = {"so400m14": "configs/siglip/so400m14_webli.py", "gopt16": "configs/siglip/gopt16_webli.py"}
TOPOLOGIES = ("v5e-8", "v5e-32", "v5e-128", "v5e-256", "v5e:16x16*4")
ROWS = 16   # a chip: fits everywhere, and gradients and parameters, not activations, are what is sent
FSDP = 8    # the same split at every size, so that only `data` grows


def measure(file: str, topology: str, rows: int = ROWS) -> dict:
    """Compiles the training step of a config with `rows` a chip.

    Returns {chips, mesh, bytes (a chip a step), bytes_by_axis, network_seconds, compute_seconds}.
    """
    config = load_config(f"{file}:topology={topology},layout=fsdp")
    config.model.remat = "full"
    config.mesh = dict(data=-1, fsdp=FSDP, slices=parse_topology(topology).slices)
    size = parse_topology(topology).size
    found = analyse(config, topology, quick=True, batch=rows * size)[0]
    estimate = found.get("roofline") or {}
    return {"chips": size, "topology": topology, "mesh": found["mesh"], "bytes": found.get("collective_bytes"),
            "bytes_by_axis": found.get("collective_bytes_by_axis"), "collectives": found.get("collectives"),
            "network_seconds": estimate.get("network"), "compute_seconds": estimate.get("compute"),
            "peak_bytes": found["memory"]["peak"], "fits": found["memory"]["fits"]}


def run(folder: Path, command: str, configs: Mapping[str, str], topologies: Sequence[str], rows: int = ROWS) -> None:
    """Compiles what the results.json of `folder` does not hold yet and writes it after every program; `configs` is {name in the table: config file}."""
    path = folder / "results.json"
    table = json.loads(path.read_text())["details"]["table"] if path.exists() else {}
    for topology in topologies:
        for name, file in configs.items():
            if topology in table.get(name, {}):
                continue
            table.setdefault(name, {})[topology] = row = measure(file, topology, rows)
            print(name, json.dumps({key: row[key] for key in ("chips", "bytes", "bytes_by_axis", "fits")}), flush=True)
            metrics = {f"{config}_bytes_{found['chips']}_chips": found["bytes"] for config, known in table.items() for found in known.values()
                       if found["bytes"] is not None}
            write_results(folder, metrics, command=command, rows_a_chip=rows, table=table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the configs and topologies named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES))
    options = parser.parse_args(arguments)
    run(Path(__file__).parent, "python -m experiments.weak_scaling.run", {name: CONFIGS[name] for name in options.configs}, options.topologies)


if __name__ == "__main__":
    main()
