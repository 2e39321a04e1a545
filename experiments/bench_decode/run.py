"""Measures greedy decoding on this machine, ours and transformers', and the rate at which weights can be read; see README.md for what is compared.

    python -m experiments.bench_decode.run                 about five minutes on two cores; writes results.json
    python -m experiments.bench_decode.run --smoke         a tiny model, seconds; writes nothing
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

import numpy as np

SIZES = {
    "32m": dict(vocab_size=8192, width=512, depth=8, mlp_dim=1408, num_heads=8, prompt=16, answer=128),
    "smoke": dict(vocab_size=64, width=32, depth=2, mlp_dim=48, num_heads=2, prompt=4, answer=8),
}
BATCHES = (1, 8)
READS = 10   # of all weights, in one measurement of the rate
# their name -> ours, under a layer
LAYER = {"self_attn.q_proj": "attention/query", "self_attn.k_proj": "attention/key", "self_attn.v_proj": "attention/value",
         "self_attn.o_proj": "attention/out", "mlp.gate_proj": "mlp/gate", "mlp.up_proj": "mlp/up", "mlp.down_proj": "mlp/down"}


def weights(size: dict) -> dict[str, np.ndarray]:
    """The same random weights in both libraries, under the names of transformers: [outputs, inputs], norms of ones."""
    rng = np.random.default_rng(0)
    width, hidden, vocabulary = size["width"], size["mlp_dim"], size["vocab_size"]

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return rng.normal(scale=inputs ** -0.5, size=(outputs, inputs)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, width), "lm_head.weight": matrix(vocabulary, width),
               "model.norm.weight": np.ones(width, np.float32)}
    for layer in range(size["depth"]):
        for name in LAYER:
            outputs, inputs = (hidden, width) if name in ("mlp.gate_proj", "mlp.up_proj") else (width, hidden) if name == "mlp.down_proj" else (width, width)
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(outputs, inputs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(width, np.float32)
    return tensors


def prompts(size: dict, batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(1, size["vocab_size"], (batch, size["prompt"]))


def streamed_bytes(size: dict) -> int:
    """What one step must read: all weights but the embedding table, of which it needs one row a sequence."""
    return 4 * (size["depth"] * (4 * size["width"] ** 2 + 3 * size["width"] * size["mlp_dim"]) + size["width"] * size["vocab_size"])


def jax_worker(size: dict) -> tuple[dict, dict]:
    """Returns {name: function that works once and returns what it made} and facts."""
    import jax
    import jax.numpy as jnp

    from vlm_jax.decoding import generate
    from vlm_jax.language.decoder import Decoder

    model = Decoder(**{key: size[key] for key in ("vocab_size", "width", "depth", "mlp_dim", "num_heads")}, norm_eps=1e-6, tied=False)
    tensors, depth, heads = weights(size), size["depth"], size["num_heads"]

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"model.layers.{layer}.{name}.weight"].T for layer in range(depth)])

    shapes = {"attention/query": (depth, -1, heads, size["width"] // heads), "attention/out": (depth, heads, size["width"] // heads, -1)}
    shapes["attention/key"] = shapes["attention/value"] = shapes["attention/query"]
    blocks: dict = {name: {"scale": np.ones((depth, size["width"]), np.float32)} for name in ("norm_attention", "norm_mlp")}
    for theirs, ours in LAYER.items():
        part, name = ours.split("/")
        kernel = stacked(theirs)
        blocks.setdefault(part, {})[name] = {"kernel": kernel.reshape(shapes.get(ours, kernel.shape))}
    params = jax.tree.map(jnp.asarray, {"token_embedding": tensors["model.embed_tokens.weight"], "blocks": blocks,
                                        "norm": {"scale": tensors["model.norm.weight"]}, "head": {"kernel": tensors["lm_head.weight"].T.copy()}})

    def decode(batch: int):
        tokens = prompts(size, batch).astype(np.int32)
        return lambda: generate(model, params, {"tokens": tokens}, max_tokens=size["answer"]).tokens.tolist()

    rows = 64
    columns = streamed_bytes(size) // 4 // rows
    everything = jnp.asarray(np.random.default_rng(2).normal(size=(rows, columns)).astype(np.float32))
    vector = jnp.ones((1, rows), jnp.float32)

    def reading(function):
        compiled = jax.jit(function)

        def read():
            for _ in range(READS):
                compiled(everything).block_until_ready()
        return read

    functions = {f"decode_{batch}": decode(batch) for batch in BATCHES}
    functions |= {"read_max": reading(lambda x: x.max(axis=1)), "read_sum": reading(lambda x: x.sum(axis=1)),
                  "read_product": reading(lambda x: (vector @ x).sum())}
    return functions, {"parameters": sum(tensor.size for tensor in tensors.values()), "version": jax.__version__}


def torch_worker(size: dict) -> tuple[dict, dict]:
    """As `jax_worker`, for transformers' LlamaForCausalLM and its `generate`."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.LlamaConfig(
        vocab_size=size["vocab_size"], hidden_size=size["width"], intermediate_size=size["mlp_dim"], num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"], num_key_value_heads=size["num_heads"], rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights(size).items()}, strict=True)

    def decode(batch: int):
        tokens = torch.from_numpy(prompts(size, batch))

        def run():
            with torch.inference_mode():
                made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=size["answer"], min_new_tokens=size["answer"],
                                      do_sample=False, use_cache=True)
            return made[:, tokens.shape[1]:].tolist()
        return run

    functions = {f"decode_{batch}": decode(batch) for batch in BATCHES}
    return functions, {"parameters": sum(p.numel() for p in model.parameters()), "version": torch.__version__, "transformers": transformers.__version__}


def work(kind: str, size: dict) -> None:
    """A child: warms everything up, then runs what it reads from stdin, one name a line, and answers with the seconds."""
    functions, facts = jax_worker(size) if kind == "jax" else torch_worker(size)
    made = {name: function() for name, function in functions.items()}
    print(json.dumps({**facts, "names": list(functions), "tokens": {name: value for name, value in made.items() if name.startswith("decode")}}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        functions[line.strip()]()
        print(json.dumps(time.perf_counter() - start), flush=True)


class Child:
    """One library in its own process, which works only while it is asked to."""

    def __init__(self, kind: str, size: str):
        # Huge pages for large allocations, for both: reading weights is half as fast where every page is looked up.
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, "-m", "experiments.bench_decode.run", "--worker", kind, "--size", size], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment)
        self.facts = self.read()
        if self.facts is None:
            sys.exit(f"{kind}: {self.close()}")
        self.seconds: dict[str, list[float]] = {name: [] for name in self.facts["names"]}

    def read(self):
        """The child's next answer; None if it died."""
        line = self.process.stdout.readline()
        while line and line[0] not in "{0123456789":   # a library's own remark
            line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def measure(self, name: str) -> None:
        """Runs a function twice and keeps the second time: while the other worked, the system may have taken this process's memory away."""
        self.process.stdin.write(2 * (name + "\n"))
        self.process.stdin.flush()
        self.read()
        self.seconds[name].append(self.read())

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def close(self) -> str:
        """Ends the process; returns the last line that it wrote on stderr."""
        self.process.communicate()
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", choices=sorted(SIZES), default="32m")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two rounds; prints, writes nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.size, options.rounds = "smoke", 2
    size = SIZES[options.size]
    if options.worker:
        work(options.worker, size)
        return

    ours, theirs = Child("jax", options.size), Child("torch", options.size)
    for _ in range(options.rounds):   # interleaved, so that a slow minute of the machine meets both
        for name in ours.seconds:
            ours.measure(name)
            if name in theirs.seconds:
                theirs.measure(name)
    rates = {name: READS * streamed_bytes(size) / ours.median(name) for name in ours.seconds if name.startswith("read")}
    rate = max(rates.values())
    speed = {batch: batch * size["answer"] / ours.median(f"decode_{batch}") for batch in BATCHES}
    peer = {batch: batch * size["answer"] / theirs.median(f"decode_{batch}") for batch in BATCHES}
    metrics = {f"tokens_per_second_over_transformers_batch{batch}": speed[batch] / peer[batch] for batch in BATCHES}
    metrics["fraction_of_memory_bound"] = speed[1] * streamed_bytes(size) / rate
    metrics |= {f"tokens_per_second_batch{batch}": speed[batch] for batch in BATCHES}
    metrics |= {f"transformers_tokens_per_second_batch{batch}": peer[batch] for batch in BATCHES}
    metrics["streaming_gigabytes_per_second"] = rate / 1e9
    same = {name: float(np.mean(np.array(tokens) == np.array(theirs.facts["tokens"][name]))) for name, tokens in ours.facts["tokens"].items()}
    details = dict(size=size, rounds=options.rounds, streamed_bytes=streamed_bytes(size),
                   gigabytes_per_second={name: value / 1e9 for name, value in rates.items()},
                   seconds={"ours": ours.seconds, "transformers": theirs.seconds}, share_of_equal_tokens=same,
                   facts={kind: {key: value for key, value in child.facts.items() if key not in ("names", "tokens")}
                          for kind, child in (("jax", ours), ("torch", theirs))})
    for child in (ours, theirs):
        child.close()
    print(json.dumps({**metrics, "share_of_equal_tokens": same}, indent=1))
    if options.size != "smoke":
        from experiments.results import write_results
        print(write_results(Path(__file__).parent, metrics, **details))


if __name__ == "__main__":
    main()
