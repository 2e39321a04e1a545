"""The golden text of a config: its resolved values, its parameter shapes, and how they lie on its topology, or else on eight devices (data=2, fsdp=4)."""
import hashlib
import json
from pathlib import Path

import jax

from vlm_jax import registry
from vlm_jax.sharding import abstract_mesh, check_replicated, parameter_shardings, replicated_share
from vlm_jax.tasks import build_task
from vlm_jax.training.config import load_config, resolve
from vlm_jax.training.trees import flatten

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
NOT_EXPERIMENTS = {"__init__", "common", "recipe"}


def config_files() -> list[str]:
    """Every experiment config of the repository, as paths relative to its root."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*/*.py") if p.stem not in NOT_EXPERIMENTS)


def golden_path(config_file: str) -> Path:
    """configs/siglip/emoji.py -> golden/siglip_emoji.txt."""
    return GOLDEN / (config_file.removeprefix("configs/").removesuffix(".py").replace("/", "_") + ".txt")


def describe(config_file: str) -> str:
    """Resolved config, mesh and, a line a leaf, path, shape, dtype and sharding. Nothing is allocated, and no device of the topology is needed."""
    config = resolve(load_config(config_file))
    task = build_task(config["task"], registry.build(**config["model"], dtypes=config["dtypes"]))
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    topology = config["topology"]
    mesh = abstract_mesh(topology, config["mesh"]) if topology else abstract_mesh("cpu-8", dict(data=2, fsdp=4))
    shardings = parameter_shardings(mesh, shapes, config["sharding"])
    check_replicated(shapes, shardings)
    share, _ = replicated_share(shapes, shardings)
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    lines = [json.dumps(config, indent=1, sort_keys=True), "", f"{topology or 'eight devices'}: {sizes}; {share:.2%} of the parameters on every device", ""]
    for (path, leaf), (_, sharding) in zip(flatten(shapes).items(), flatten(shardings).items()):
        lines.append(f"{path} {leaf.shape} {leaf.dtype} {sharding.spec}")
    return "\n".join(lines) + "\n"


def program(config_file: str) -> str:
    """A digest of what the test variant compiles: two configs with the same digest need not both be trained."""
    config = resolve(load_config(f"{config_file}:variant=test"))
    return hashlib.sha256(json.dumps({key: value for key, value in config.items() if key != "name"}, sort_keys=True).encode()).hexdigest()
