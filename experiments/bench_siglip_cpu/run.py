"""Measures forward pass and training step of SigLIP B/16 on this CPU, ours and transformers'; see README.md for what is compared.

    python -m experiments.bench_siglip_cpu.run                  about ten minutes on two cores; writes results.json
    python -m experiments.bench_siglip_cpu.run --smoke          a tiny model, seconds; writes nothing
"""
import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {   # patch, pixels, width, depth, heads, text length, vocabulary
    "b16": dict(patch=16, pixels=224, width=768, depth=12, heads=12, length=64, vocab=32_000),
    "smoke": dict(patch=8, pixels=32, width=64, depth=2, heads=2, length=8, vocab=100),
}
RATE = 1e-3   # of the SGD update that ends a training step


def products(size: dict, batch: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of the matrix products whose rate is measured: a large square, and the model's own layers."""
    shapes = [(2048, 2048, 2048)]
    for tokens in ((size["pixels"] // size["patch"]) ** 2, size["length"]):
        rows, width = batch * tokens, size["width"]
        shapes += [(rows, width, width), (rows, width, 4 * width), (rows, 4 * width, width)]
    return shapes


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def jax_worker(size: dict, batch: int) -> tuple[dict, dict]:
    """Returns {name: function that runs once and waits} and facts about the model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vlm_jax import registry
    from vlm_jax.losses import sigmoid_loss
    from vlm_jax.models.dual_encoder import parameter_count
    from vlm_jax.training.flops import count_flops

    sizes = dict(width=size["width"], depth=size["depth"], num_heads=size["heads"], mlp_dim=4 * size["width"])
    model = registry.build("siglip", "b16-224", image=dict(sizes, patch_size=size["patch"], image_size=size["pixels"]), embed_dim=size["width"],
                           text=dict(sizes, length=size["length"], vocab_size=size["vocab"]), scan=False)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(batch, size["pixels"], size["pixels"], 3)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, size["vocab"], (batch, size["length"])), jnp.int32)

    def loss(params):
        (of_image, of_text), out = model.apply({"params": params}, image, tokens)
        total, weight = sigmoid_loss(of_image, of_text, out["logit_scale"], out["logit_bias"], chunked=False)
        return total / weight

    def train(params):
        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - RATE * g, params, gradients)

    params = jax.jit(model.init)(jax.random.key(0), image, tokens)["params"]
    forward, step = jax.jit(loss), jax.jit(train, donate_argnums=0)
    holder = {"params": params}

    def run_forward():
        holder["loss"] = float(forward(holder["params"]))

    def run_train():
        value, holder["params"] = step(holder["params"])
        jax.block_until_ready(holder["params"])
        holder["loss"] = float(value)

    shapes = jax.eval_shape(lambda: params)
    functions = {"forward": run_forward, "train": run_train}
    for n, k, m in products(size, batch):
        a, b, product = jnp.ones((n, k)), jnp.ones((k, m)), jax.jit(jnp.matmul)
        functions[f"product_{n}x{k}x{m}"] = lambda a=a, b=b, product=product: product(a, b).block_until_ready()
    return functions, {"forward_flops": count_flops(loss, shapes), "train_flops": count_flops(train, shapes), "parameters": parameter_count(model),
                       "version": jax.__version__}


def torch_worker(size: dict, batch: int, mode: str) -> tuple[dict, dict]:
    """As `jax_worker`, for transformers' SiglipModel; `mode` is "eager", "sdpa" or "compile" (sdpa under torch.compile)."""
    import torch
    import transformers

    sizes = dict(hidden_size=size["width"], intermediate_size=4 * size["width"], num_hidden_layers=size["depth"], num_attention_heads=size["heads"])
    config = transformers.SiglipConfig(
        vision_config=dict(sizes, image_size=size["pixels"], patch_size=size["patch"]),
        text_config=dict(sizes, vocab_size=size["vocab"], max_position_embeddings=size["length"], bos_token_id=0, eos_token_id=1, pad_token_id=1),
        attn_implementation="eager" if mode == "eager" else "sdpa")
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.SiglipModel(config).train()
    call = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    inputs = dict(input_ids=torch.randint(0, size["vocab"], (batch, size["length"])), pixel_values=torch.randn(batch, 3, size["pixels"], size["pixels"]),
                  return_loss=True)

    def run_forward():
        with torch.inference_mode() if mode != "compile" else torch.no_grad():
            call(**inputs).loss.item()

    def run_train():
        optimizer.zero_grad(set_to_none=True)
        loss = call(**inputs).loss
        loss.backward()
        optimizer.step()
        loss.item()

    functions = {"forward": run_forward, "train": run_train}
    for n, k, m in products(size, batch):
        a, b = torch.ones(n, k), torch.ones(k, m)
        functions[f"product_{n}x{k}x{m}"] = lambda a=a, b=b: torch.mm(a, b)
    return functions, {"parameters": sum(p.numel() for p in model.parameters()), "version": torch.__version__, "transformers": transformers.__version__}


def work(kind: str, size: dict, batch: int) -> None:
    """A child: builds, warms everything up, then runs what it reads from stdin, one name a line, and answers with the seconds."""
    functions, facts = jax_worker(size, batch) if kind == "jax" else torch_worker(size, batch, kind.removeprefix("torch_"))
    for function in functions.values():
        function()
        function()
    print(json.dumps({**facts, "names": list(functions)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(functions[line.strip()])), flush=True)


class Child:
    """One library in its own process, which works only while it is asked to."""

    def __init__(self, kind: str, size: str, batch: int):
        # Huge pages for large allocations: without them both libraries spend a tenth of a step on page faults.
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "experiments.bench_siglip_cpu.run", "--worker", kind, "--size", size, "--batch", str(batch)]
        self.errors = tempfile.TemporaryFile("w+")   # a pipe that nobody reads would fill and stop the child
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment)
        self.facts = self.read()
        self.seconds: dict[str, list[float]] = {name: [] for name in self.facts["names"]} if self.facts else {}

    def read(self) -> dict | float | None:
        """The child's next answer; None if it died."""
        line = self.process.stdout.readline()
        while line and line[0] not in "{0123456789":   # a library's own remark
            line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def measure(self) -> None:
        """Runs every function twice and keeps the second time: while the others worked, the system may have taken this process's memory away."""
        for name, seconds in self.seconds.items():
            self.process.stdin.write(2 * (name + "\n"))
            self.process.stdin.flush()
            self.read()
            seconds.append(self.read())

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}

    def close(self) -> str:
        """Ends the process; returns the last line that it wrote on stderr."""
        self.process.communicate()
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or [""])[-1]


def gigaflops(medians: dict[str, float]) -> dict[str, float]:
    """{shape: GF/s} of the matrix products."""
    rates = {}
    for name, seconds in medians.items():
        if name.startswith("product_"):
            n, k, m = map(int, name.removeprefix("product_").split("x"))
            rates[name.removeprefix("product_")] = 2 * n * k * m / seconds / 1e9
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", choices=sorted(SIZES), default="b16")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two rounds; prints, writes nothing")
    parser.add_argument("--peers", default="eager,sdpa,compile", help="ways to run the peer; empty for none")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.size, options.rounds = "smoke", 2
    size = SIZES[options.size]
    if options.worker:
        work(options.worker, size, options.batch)
        return

    ours, peers, absent = Child("jax", options.size, options.batch), {}, {}
    for mode in filter(None, options.peers.split(",")):
        child = Child(f"torch_{mode}", options.size, options.batch)
        if child.facts:
            peers[mode] = child
        else:
            absent[mode] = child.close()
    for _ in range(options.rounds):   # interleaved, so that a slow minute of the machine meets all
        for child in (ours, *peers.values()):
            child.measure()

    own, theirs = ours.medians(), {mode: child.medians() for mode, child in peers.items()}
    rates = gigaflops(own)
    peak = max(rates.values())
    metrics = {"gflops_jax": peak}
    for part in ("forward", "train"):
        metrics[f"{part}_seconds"] = own[part]
        metrics[f"{part}_time_over_matmul_peak"] = own[part] / (ours.facts[f"{part}_flops"] / (peak * 1e9))
        if theirs:
            metrics[f"{part}_time_over_torch"] = own[part] / min(medians[part] for medians in theirs.values())
    if theirs:
        metrics["gflops_torch"] = max(max(gigaflops(medians).values()) for medians in theirs.values())
    details = dict(batch=options.batch, rounds=options.rounds, facts_jax=ours.facts, product_gflops_jax=rates,
                   torch={mode: {**child.facts, "medians": theirs[mode]} for mode, child in peers.items()}, torch_modes_that_failed=absent)
    for child in (ours, *peers.values()):
        child.close()
    print(json.dumps(metrics, indent=1))
    if absent:
        print(f"not measured: {absent}")
    if options.size == "b16":
        from experiments.results import write_results
        print(write_results(Path(__file__).parent, metrics, **details))


if __name__ == "__main__":
    main()
