"""Compiled peak memory per device of a SigLIP B/16 training step with each memory switch on and off, and of a vocabulary loss. Nothing is run.

    python -m experiments.memory_switches.run                      # every switch, TPU v5e-8 and 8 simulated CPU devices
    python -m experiments.memory_switches.run --platforms tpu --only base,remat      # rows whose names begin so; the others stay as they were recorded

TPU programs are compiled ahead of time by libtpu for a topology that is not there. The figure is what the compiler plans on one device:
arguments + outputs - aliased + temporaries. The rows of the platform `state` are the bytes of the training state alone (parameters, optimiser), those of
`kept` the bytes that a stack of blocks keeps for its backward pass; both need no compiler.
"""
import argparse
from importlib.metadata import version
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

FOLDER = Path(__file__).parent
BATCH = 256
TOPOLOGY = "v5e:2x4"
MODEL = dict(name="siglip", preset="b16-224")
ADAMW = dict(name="adamw", weight_decay=1e-4)
LOW = dict(momentum_dtype="bfloat16", second_moment_dtype="bfloat16")
LOCKED = [["image/.*", None], [".*", {}]]

# name -> what differs from the base: sections of the config, and of its stage
SWITCHES: dict[str, dict[str, Any]] = {
    "base": {},
    **{f"remat={name}": dict(model=dict(remat=name)) for name in ("full", "attention", "mlp", "minimal", "dots_no_batch", "dots", "offload")},
    "chunked=False": dict(task=dict(chunked=False)),
    "donate=False": dict(donate=False),
    "fsdp=8": dict(mesh=dict(data=1, fsdp=8)),
    "momentum bf16": dict(stage=dict(optimizer={**ADAMW, "momentum_dtype": "bfloat16"})),
    "both moments bf16": dict(stage=dict(optimizer={**ADAMW, **LOW})),
    "lion bf16": dict(stage=dict(optimizer=dict(name="lion", momentum_dtype="bfloat16"))),
    "adafactor": dict(stage=dict(optimizer=dict(name="adafactor"))),
    "accumulate=4 cached": dict(stage=dict(accumulate=dict(micro_batches=4, cached=True))),
    "image frozen": dict(stage=dict(train=LOCKED)),
    "image frozen, bf16": dict(stage=dict(train=LOCKED), dtypes=dict(frozen="bfloat16")),
    "image frozen, bf16, remat=full": dict(stage=dict(train=LOCKED), dtypes=dict(frozen="bfloat16"), model=dict(remat="full")),
    "all: full, fsdp=8, moments bf16": dict(model=dict(remat="full"), mesh=dict(data=1, fsdp=8), stage=dict(optimizer={**ADAMW, **LOW})),
    "scan=False": dict(model=dict(scan=False)),
    "scan=False, remat=full": dict(model=dict(scan=False, remat="full")),
}
# What twelve blocks as ViT-B's keep of 8 rows of 256 tokens, by policy of rematerialisation and dtype of the products.
KEPT: dict[str, dict[str, str]] = {f"{dtype}, remat={remat}": dict(remat=remat, dtype=dtype) for dtype in ("bfloat16", "float32")
                                   for remat in ("none", "minimal", "attention", "mlp", "full")}
# A head as PaliGemma's: 257,152 entries, width 2,048, tied; 4 x 512 positions on each of 8 devices, the table split over them (fsdp).
VOCABULARY: dict[str, dict[str, Any]] = {"vocabulary dense": dict(tiled=False), "vocabulary tiled": dict(tiled=True)}
PLATFORMS: dict[str, tuple[str, ...]] = {
    "state": ("base", "fsdp=8", "momentum bf16", "both moments bf16", "lion bf16", "adafactor", "image frozen", "image frozen, bf16",
              "all: full, fsdp=8, moments bf16"),
    "kept": tuple(KEPT),
    "tpu": (*SWITCHES, *VOCABULARY),
    "cpu": ("base", "remat=full", "remat=minimal", "donate=False", "fsdp=8", "both moments bf16", "image frozen, bf16", *VOCABULARY),
}


def config_of(switch: dict[str, Any], model: dict[str, Any] = MODEL, batch: int = BATCH) -> dict[str, Any]:
    """The training config with one switch changed."""
    from vlm_jax.training.config import merge
    base = dict(
        name="memory_switches", model=model, processor=dict(image=[], text=[]), task=dict(name="contrastive", loss="sigmoid"), mesh=dict(data=-1),
        dtypes=dict(compute="bfloat16"),
        stages=[dict(steps=10, data=dict(pairs=dict(source={}, batch_size=batch)), optimizer=ADAMW, schedule=dict(name="constant", peak=1e-3))])
    base["stages"] = [{**base["stages"][0], **switch.get("stage", {})}]
    return merge(base, {key: value for key, value in switch.items() if key not in ("stage", "donate")})


def build(switch: dict[str, Any], devices, **size: Any):
    """What a stage trains with, one switch changed."""
    from vlm_jax.training import setup
    from vlm_jax.training.config import resolve
    config = resolve(config_of(switch, **size))
    return setup.build(config, 0, setup.read(config), devices, data=False)


def compile_switch(switch: dict[str, Any], devices, **size: Any):
    """The compiled training step."""
    import jax
    import numpy as np

    from vlm_jax.training.dry_run import abstract_batch
    parts = build(switch, devices, **size)
    step = parts.step
    if not switch.get("donate", True):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract_state)
        step = jax.jit(step.__wrapped__, out_shardings=(shardings, None))
    with jax.set_mesh(parts.mesh):
        return step.lower(parts.abstract_state, abstract_batch(parts), jax.ShapeDtypeStruct((), np.int32)).compile()


def compile_vocabulary(tiled: bool, devices, positions: tuple[int, int] = (4, 512), width: int = 2048, entries: int = 257_152):
    """The compiled loss of a language model's head and its gradients by hidden states and table."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from vlm_jax.losses import vocabulary_loss
    from vlm_jax.sharding import make_mesh
    mesh = make_mesh(data=1, fsdp=len(devices), devices=devices)
    rows, table = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def loss(hidden, kernel, targets, weight):
        total, count = vocabulary_loss(hidden, kernel, targets, weight=weight, tied=True, tiled=tiled, mesh=mesh)
        return total / count
    shape = (positions[0] * len(devices), positions[1])
    arguments = (jax.ShapeDtypeStruct((*shape, width), jnp.bfloat16, sharding=rows), jax.ShapeDtypeStruct((entries, width), jnp.float32, sharding=table),
                 jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows), jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, (rows, table)))
    return step.lower(*arguments).compile()


def kept_bytes(remat: str, dtype: str, rows: int = 8, tokens: int = 256, width: int = 768, depth: int = 12, **settings: Any) -> int:
    """The bytes that blocks keep for the backward pass beside their parameters, from the shapes of `jax.vjp`: what the compiler is given, not its plan.

    Parameters are among those shapes and do not grow with the rows, so the figure is twice what half of the rows add.
    """
    from functools import partial
    import math

    import jax
    import jax.numpy as jnp

    from vlm_jax.nn.block import TransformerBlock
    from vlm_jax.nn.stack import Stack
    stack = Stack(partial(TransformerBlock, width // 64, 4 * width, dtype=dtype, **settings), depth, True, remat)

    def residuals(rows: int) -> int:
        x = jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32)
        params = jax.eval_shape(stack.init, jax.random.key(0), x)
        back = jax.eval_shape(lambda params, x: jax.vjp(lambda params, x: stack.apply(params, x)[0], params, x)[1], params, x)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))
    return 2 * (residuals(rows) - residuals(rows // 2))


def figures(compiled) -> dict[str, int]:
    """Bytes on one device, as the compiler plans them."""
    plan = compiled.memory_analysis()
    arguments, outputs, aliased = plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.alias_size_in_bytes
    return dict(peak=arguments + outputs - aliased + plan.temp_size_in_bytes, arguments=arguments, aliased=aliased, temporaries=plan.temp_size_in_bytes,
                host=plan.host_temp_size_in_bytes)


def work(platform: str, names: list[str]) -> None:
    """A child: compiles the named rows for one platform, one after the other, and prints each as a line of JSON."""
    import jax
    if platform == "tpu":
        from jax.experimental import topologies
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices)
    else:
        devices = jax.devices()
    for name in names:
        row: dict[str, Any] = dict(platform=platform, switch=name)
        try:
            if platform == "kept":
                row["kept"] = kept_bytes(**KEPT[name])
                print(json.dumps(row), flush=True)
                continue
            if platform == "state":
                from vlm_jax.training.dry_run import state_bytes
                row["state"] = state_bytes(build(SWITCHES[name], devices).abstract_state)
                print(json.dumps(row), flush=True)
                continue
            compiled = compile_vocabulary(devices=devices, **VOCABULARY[name]) if name in VOCABULARY else compile_switch(SWITCHES[name], devices)
            row.update(figures(compiled))
        except jax.errors.JaxRuntimeError as error:   # more than the device has: the message says how much
            row["error"] = " ".join(str(error).split())[:300]
        print(json.dumps(row), flush=True)


def measure(platform: str, names: list[str]) -> list[dict[str, Any]]:
    """Rows of a platform, from a process of its own."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1", XLA_FLAGS=flags)
    command = [sys.executable, "-m", "experiments.memory_switches.run", "--child", json.dumps([platform, names])]
    rows = []
    with subprocess.Popen(command, env=environment, cwd=FOLDER.parents[1], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print(line_of(rows[-1]), flush=True)
                record([rows[-1]])
    if len(rows) < len(names):
        raise RuntimeError(f"{platform}: the child ended with {child.returncode} after {len(rows)} of {len(names)} rows.")
    return rows


def record(rows: list[dict[str, Any]]) -> Path:
    """Writes rows into results.json, beside those of other switches and platforms that it holds; each is a compilation of its own."""
    from experiments.results import write_results
    path = FOLDER / "results.json"
    old = json.loads(path.read_text())["details"]["bytes_per_device"] if path.exists() else []
    table = {(row["platform"], row["switch"]): row for row in [*old, *rows]}
    known = [(platform, name) for platform, names in PLATFORMS.items() for name in names]
    rows = [table[key] for key in known if key in table]
    hardware = {"jax": version("jax"), "libtpu": version("libtpu"), "devices": f"TPU {TOPOLOGY} (compiled, not run) and 8 simulated CPU devices"}
    return write_results(FOLDER, metrics_of(rows), hardware=hardware, command="python -m experiments.memory_switches.run", batch=BATCH, model=MODEL,
                         bytes_per_device=rows)


def line_of(row: dict[str, Any]) -> str:
    """One row as text."""
    if "error" in row:
        return f"{row['platform']:5} {row['switch']:34} {row['error']}"
    numbers = "  ".join(f"{name} {row[name] / 2**20:9,.0f}" for name in ("state", "kept", "peak", "temporaries", "arguments", "aliased", "host") if name in row)
    return f"{row['platform']:5} {row['switch']:34} {numbers}  MiB"


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, MiB on one device."""
    lines = ["| program | switch | peak | temporaries | arguments | in host memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['platform']} | {row['switch']} | does not fit | | | |")
        elif "state" in row:
            lines.append(f"| state | {row['switch']} | {row['state'] / 2**20:,.0f} | | | |")
        elif "kept" in row:
            lines.append(f"| kept | {row['switch']} | {row['kept'] / 2**20:,.0f} | | | |")
        else:
            peak, temporaries, arguments, host = (f"{row[name] / 2**20:,.0f}" for name in ("peak", "temporaries", "arguments", "host"))
            lines.append(f"| {row['platform']} | {row['switch']} | {peak} | {temporaries} | {arguments} | {host if row['host'] else ''} |")
    return "\n".join(lines)


def metrics_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The peaks in MiB on a TPU device, and the vocabulary loss against dense."""
    peaks = {row["switch"]: row["peak"] for row in rows if row["platform"] == "tpu" and "peak" in row}
    metrics = {f"tpu_mib[{name}]": peak / 2**20 for name, peak in peaks.items()}
    metrics.update({f"state_mib[{row['switch']}]": row["state"] / 2**20 for row in rows if "state" in row})
    metrics.update({f"kept_mib[{row['switch']}]": row["kept"] / 2**20 for row in rows if "kept" in row})
    temporaries = {row["switch"]: row["temporaries"] for row in rows if row["platform"] == "tpu" and "peak" in row}
    if set(VOCABULARY) <= set(temporaries):
        metrics["vocabulary_tiled_over_dense_temporaries"] = temporaries["vocabulary tiled"] / temporaries["vocabulary dense"]
    return metrics


def main() -> None:
    """Compiles the rows and writes each into results.json as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platforms", default="state,kept,tpu,cpu")
    parser.add_argument("--only", default="", help="beginnings of the names of rows, separated by commas")
    parser.add_argument("--table", action="store_true", help="compiles nothing, prints what is recorded as Markdown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work(*json.loads(options.child))
        return
    if options.table:
        print(table_of(json.loads((FOLDER / "results.json").read_text())["details"]["bytes_per_device"]))
        return
    wanted = options.only.split(",")
    for platform in options.platforms.split(","):
        measure(platform, [name for beginning in wanted for name in PLATFORMS[platform] if name.startswith(beginning)])


if __name__ == "__main__":
    main()
