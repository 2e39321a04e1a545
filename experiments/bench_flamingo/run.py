"""Measures, on two cores, a training step of a small Flamingo beside transformers' IDEFICS, and questions behind 32 cached examples; see README.md.

    python -m experiments.bench_flamingo.run                    about ten minutes on two idle cores, most of them compiling; writes results.json
    python -m experiments.bench_flamingo.run --variant test     tiny models, seconds; writes only where --output says
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

FOLDER = Path(__file__).parent
CORES = 2
RATE = 1e-4
SIZES = {   # image_depth, latents, resampler_depth: of tower and resampler; shots, shot, query, answer: examples of a context and tokens of each
    "full": dict(width=256, depth=6, every=2, heads=4, vocab=8192, pixels=64, patch=16, image_width=256, image_depth=6, latents=16, resampler_depth=2,
                 batch=8, pictures=5, tokens=64, shots=32, shot=8, query=4, answer=8),
    "test": dict(width=16, depth=2, every=2, heads=2, vocab=64, pixels=16, patch=8, image_width=16, image_depth=1, latents=2, resampler_depth=1,
                 batch=2, pictures=2, tokens=8, shots=3, shot=4, query=3, answer=2),
}


def batch_of(size: dict) -> dict[str, np.ndarray]:
    """Rows of `tokens` tokens, whose pictures stand at equal distances from the first token on."""
    rng = np.random.default_rng(0)
    index = np.arange(size["tokens"]) * size["pictures"] // size["tokens"]
    return dict(tokens=rng.integers(1, size["vocab"], (size["batch"], size["tokens"])).astype(np.int32),
                images=rng.normal(size=(size["batch"], size["pictures"], size["pixels"], size["pixels"], 3)).astype(np.float32),
                media_index=np.broadcast_to(index, (size["batch"], size["tokens"])).astype(np.int32))


def jax_model(size: dict):
    """IDEFICS at this size: a tower, LLaMA, a resampler and gated blocks with RMS norms and gated MLPs."""
    from vlm_jax.models.cross_attention_lm import CrossAttentionLM
    width, heads = size["width"], size["heads"]
    image = dict(image_size=size["pixels"], patch_size=size["patch"], width=size["image_width"], depth=size["image_depth"], mlp_dim=4 * size["image_width"],
                 num_heads=heads, pool="cls", patch_bias=False, norm_before=True, activation="gelu", norm_eps=1e-5)
    language = dict(vocab_size=size["vocab"], width=width, depth=size["depth"], mlp_dim=4 * width, num_heads=heads, tied=False)
    gated = dict(every=size["every"], num_heads=heads, mlp_dim=4 * width, norm="rms", norm_eps=1e-6, norm_media=False, activation="silu", gated=True)
    resampler = dict(num_latents=size["latents"], depth=size["resampler_depth"], num_heads=heads, head_dim=width // heads, activation="relu",
                     frame_embedding=False)
    return CrossAttentionLM(image, language, scan=False, gated=gated, resampler=resampler, image_features="unnormalised_with_class")


def jax_worker(size: dict) -> tuple[dict, dict]:
    """Returns {name: function that works once and waits} and facts."""
    import jax
    import jax.numpy as jnp
    import optax

    from vlm_jax.decoding import generate, prefix_cache
    from vlm_jax.tasks.generation import GenerationTask

    model = jax_model(size)
    batch = batch_of(size)
    rng = np.random.default_rng(2)

    def drawn(path, leaf):
        # Norms as they begin, gates a little open: at 0 nothing of the pictures would reach the loss.
        fixed = {"scale": 1.0, "bias": 0.0, "gate_cross": 0.1, "gate_mlp": 0.1}.get(path[-1].key)
        return jnp.asarray(rng.normal(scale=0.02, size=leaf.shape) if fixed is None else np.full(leaf.shape, fixed), jnp.float32)

    params = jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    frozen, trained = ({name: params[name] for name in names} for names in (("image", "language"), ("gated", "resampler")))
    optimizer, task = optax.adamw(RATE, weight_decay=0.01), GenerationTask(model)
    stream = {**batch, "loss_weights": np.ones(batch["tokens"].shape, np.float32)}

    def step(trained, state, frozen, stream):
        def loss(trained):
            terms, _, _ = task.loss({**trained, **frozen}, {}, {"documents": stream}, jax.random.key(0), 0)
            total, count = terms["generation"]
            return total / count
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return value, optax.apply_updates(trained, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in (("trained", trained), ("frozen", frozen))}
    held = {"trained": jax.tree.map(jnp.copy, trained), "state": optimizer.init(trained), "losses": []}
    held["stream"] = jax.tree.map(jnp.asarray, stream)

    def train():
        value, held["trained"], held["state"] = jitted(held["trained"], held["state"], frozen, held["stream"])
        held["losses"].append(float(value))

    context, query = context_of(size)
    whole = dict(tokens=np.concatenate([context["tokens"], query["tokens"]], 1), images=np.concatenate([context["images"], query["images"]], 1),
                 media_index=np.concatenate([context["media_index"], query["media_index"] + size["shots"]], 1))
    prefix = prefix_cache(model, params, context)

    def ask(inputs, prefix=None):
        return generate(model, params, inputs, max_tokens=size["answer"], prefix=prefix).tokens.tolist()

    functions = {"train": train, "cached_query": lambda: ask(query, prefix), "re_encoded_query": lambda: ask(whole)}
    return functions, {**counts, "same_answer": ask(query, prefix) == ask(whole), "losses": held["losses"], "version": jax.__version__}


def context_of(size: dict) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(examples, a query): a picture and `shot` or `query` tokens each."""
    rng = np.random.default_rng(1)

    def made(number: int, tokens: int) -> dict[str, np.ndarray]:
        return dict(tokens=rng.integers(1, size["vocab"], (1, number * tokens)).astype(np.int32),
                    images=rng.normal(size=(1, number, size["pixels"], size["pixels"], 3)).astype(np.float32),
                    media_index=np.repeat(np.arange(number, dtype=np.int32), tokens)[None])
    return made(size["shots"], size["shot"]), made(1, size["query"])


def torch_worker(size: dict, attention: str) -> tuple[dict, dict]:
    """As `jax_worker`, a training step of transformers' IdeficsForVisionText2Text."""
    import torch
    import transformers
    torch.manual_seed(0)
    torch.set_num_threads(CORES)
    heads, width = size["heads"], size["width"]
    config = transformers.IdeficsConfig(
        vocab_size=size["vocab"], additional_vocab_size=0, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=size["depth"],
        num_attention_heads=heads, cross_layer_interval=size["every"], alpha_initializer="ones", alpha_type="float", use_resampler=True, use_cache=False,
        rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, attn_implementation=attention,
        vision_config=dict(embed_dim=size["image_width"], image_size=size["pixels"], patch_size=size["patch"], num_hidden_layers=size["image_depth"],
                           num_attention_heads=heads, intermediate_size=4 * size["image_width"], hidden_act="gelu"),
        perceiver_config=dict(use_resampler=True, resampler_n_latents=size["latents"], resampler_depth=size["resampler_depth"], resampler_n_heads=heads,
                              resampler_head_dim=width // heads, qk_layer_norms_perceiver=False))
    model = transformers.IdeficsForVisionText2Text(config).train()
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gated_cross_attn" in name or "perceiver" in name)
        if parameter.requires_grad:
            trained.append(parameter)
    batch = batch_of(size)
    index = torch.from_numpy(batch["media_index"].astype(np.int64))
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64))
    inputs = dict(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens),
                  pixel_values=torch.from_numpy(batch["images"]).permute(0, 1, 4, 2, 3).contiguous(),
                  image_attention_mask=torch.nn.functional.one_hot(index, size["pictures"]))
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01), []

    def train():
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    counts = {"trained": sum(p.numel() for p in trained), "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad)}
    return {"train": train}, {**counts, "losses": losses, "version": torch.__version__, "transformers": transformers.__version__}


def work(kind: str, size: dict) -> None:
    """A child: warms everything up, then runs what it reads from stdin, one name a line, and answers with the seconds."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    functions, facts = jax_worker(size) if kind == "jax" else torch_worker(size, kind.removeprefix("torch_"))
    for function in functions.values():
        function()
        function()
    print(json.dumps({**facts, "names": list(functions)}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        functions[line.strip()]()
        print(json.dumps(time.perf_counter() - start), flush=True)


class Child:
    """One library in its own process, which works only while it is asked to."""

    def __init__(self, kind: str, variant: str):
        # Huge pages for large allocations, for both.
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, "-m", "experiments.bench_flamingo.run", "--worker", kind, "--variant", variant],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment, cwd=FOLDER.parents[1])
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

    def measure(self) -> None:
        """Runs every function twice and keeps the second time: while the others worked, the system may have taken this process's memory away."""
        for name, seconds in self.seconds.items():
            self.process.stdin.write(2 * (name + "\n"))
            self.process.stdin.flush()
            self.read()
            seconds.append(self.read())

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def close(self) -> str:
        """Ends the process; returns the last line that it wrote on stderr."""
        self.process.communicate()
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or [""])[-1]


def main(variant: str, rounds: int, output: Path | None) -> dict[str, float]:
    """Measures and, where there is an output folder, writes results.json; returns the metrics."""
    children = {kind: Child(kind, variant) for kind in ("jax", "torch_eager", "torch_sdpa")}
    for _ in range(rounds):   # interleaved, so that a slow minute of the machine meets all
        for child in children.values():
            child.measure()
    ours, peers = children["jax"], [child for kind, child in children.items() if kind != "jax"]
    step, theirs = ours.median("train"), min(child.median("train") for child in peers)
    cached, whole = ours.median("cached_query"), ours.median("re_encoded_query")
    metrics = {"train_time_over_torch": step / theirs, "cached_query_time_over_reencoding": cached / whole, "train_seconds": step,
               "torch_train_seconds": theirs, "cached_query_seconds": cached, "re_encoded_query_seconds": whole}
    details = dict(variant=variant, size=SIZES[variant], rounds=rounds, cores=CORES, seconds={kind: child.seconds for kind, child in children.items()},
                   facts={kind: {name: value for name, value in child.facts.items() if name != "names"} for kind, child in children.items()})
    for child in children.values():
        child.close()
    print(json.dumps({**metrics, "facts": details["facts"]}, indent=1))
    if output is not None:
        from experiments.results import write_results
        print(write_results(output, metrics, name="bench_flamingo", **details))
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variant", default="full", choices=sorted(SIZES))
    parser.add_argument("--output", type=Path, help="where results.json goes; by default, of the full variant, here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, SIZES[options.variant])
    else:
        main(options.variant, options.rounds, options.output or (FOLDER if options.variant == "full" else None))
