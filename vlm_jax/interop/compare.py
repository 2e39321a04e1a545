"""The PyTorch reference and ours side by side: `python -m vlm_jax.interop.compare DIR`.

Loads the directory with transformers and with this library, runs both on random and on real inputs (drawn pictures and sentences through each side's own
preprocessing) in float32, and prints the relative difference, max|a - b| / max|b|, after every layer and at the end. Exit code 0 if all are within 1e-4.
Needs torch and transformers (pip install 'vlm_jax[parity]'); nothing is fetched.
"""
import argparse
from collections.abc import Iterator, Sequence
import os
import sys
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.interop.compare_reference import compiled, language_pairs, tower_pairs
from vlm_jax.interop.directory import Imported, load_directory

TOLERANCE = 1e-4
WORDS = "A red circle stands left of two small blue squares; what do you see here? ".split()


def relative_difference(ours: Any, theirs: Any) -> float:
    """max|a - b| / max|b|; infinite for other shapes or numbers that are not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max(initial=0.0) / max(np.abs(theirs).max(initial=0.0), 1e-30))


def reference_of(folder: str) -> Any:
    """The model of transformers, in float32, whose class config.json names.

    Raises:
      ConfigError: if torch or transformers are not installed, or transformers has no such class.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"compare needs PyTorch and transformers ({error}); run: pip install 'vlm_jax[parity]'.") from None
    from vlm_jax.interop.config_reader import Section, read_config
    name = Section(read_config(folder)).architecture()
    cls = getattr(transformers, name or "AutoModel", None)
    if cls is None:
        raise ConfigError(f"{folder}/config.json: architectures is {name!a:.60}, which transformers {transformers.__version__} does not have; correct it.")
    return cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def compare(folder: str, batch: int = 2, seed: int = 0, echo: Any = print) -> float:
    """Compares everything that can be compared; prints a line each; returns the largest relative difference.

    Raises:
      ConfigError, CheckpointError: see `reference_of` and `load_directory`.
    """
    folder = os.path.expanduser(folder)
    theirs, ours = reference_of(folder), load_directory(folder, dtype="float32")
    import torch
    worst = 0.0
    for kind, inputs in (("random", random_inputs(ours.model, batch, seed)), ("real", real_inputs(ours))):
        if inputs is None:
            echo(f"{kind:<8}{'(the directory has no processor or tokenizer)'}")
            continue
        with torch.no_grad():
            for name, one, other in pairs(theirs, ours, inputs):
                difference = relative_difference(one, other)
                worst = max(worst, difference)
                echo(f"{kind:<8}{name:<40}{difference:.2e}{'' if difference <= TOLERANCE else '   <-- above ' + format(TOLERANCE, 'g')}")
    echo(f"largest relative difference {worst:.2e} ({'within' if worst <= TOLERANCE else 'ABOVE'} {TOLERANCE:g})")
    return worst


def random_inputs(model: Any, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs of the shapes that a model asks for; texts are short, and for models of text the second row is padded."""
    rng, made = np.random.default_rng(seed), {}
    shapes = model.input_shapes()
    for name, shape in shapes.items():
        if name in ("tokens", "targets"):
            length = min(shape[0], 24) if shape[0] else 24
            made[name] = rng.integers(3, max(vocabulary(model) - 1, 4), (batch, length))
        elif name == "image" and len(shape) == 2:
            made[name] = random_patches(rng, batch, shape)
        elif name in ("image", "images"):
            made[name] = rng.normal(size=(batch, *shape)).astype(np.float32)
        elif name == "patches":
            made[name] = random_patches(rng, batch, shape)
    if "slots" in shapes:
        count = model.image_tokens()
        words = made["tokens"][:, :16]
        made["tokens"] = np.concatenate([np.zeros((batch, count), words.dtype), words], 1)
        made["slots"] = np.concatenate([np.tile(np.arange(count), (batch, 1)), np.full(words.shape, -1)], 1)
    return made


def random_patches(rng: np.random.Generator, batch: int, shape: tuple[int, int]) -> np.ndarray:
    """Patches of pictures of several aspect ratios, [row, column, pixels]."""
    count, values = shape
    made = np.zeros((batch, count, values), np.float32)
    for number, picture in enumerate(made):
        rows = max(1, int(count ** 0.5) - number % 2)
        columns = count // rows
        here = picture[:rows * columns]
        here[:, 0], here[:, 1] = np.repeat(np.arange(rows), columns) + 1, np.tile(np.arange(columns), rows) + 1
        here[:, 2:] = rng.normal(size=(rows * columns, values - 2))
    return made


def vocabulary(model: Any) -> int:
    """How many tokens a model knows."""
    from vlm_jax.interop.processors import vocab_size
    return vocab_size(model) or 4


def real_inputs(ours: Imported) -> dict[str, np.ndarray] | None:
    """Drawn pictures and sentences through the directory's own processor; None where it has none."""
    processor = ours.processor
    shapes = ours.model.input_shapes()
    needs_text = bool({"tokens", "targets"} & set(shapes))
    if processor is None or (needs_text and processor.tokenizer is None):
        return None
    pictures = [drawn(64, 96), drawn(120, 50)]
    if processor.format is not None:
        wants = bool({"images", "patches"} & set(shapes))
        made = dict(processor.prompts(pictures if wants else None, [" ".join(WORDS[:9]), " ".join(WORDS[3:6])]))
        if "targets" in shapes:
            ids = processor.tokenizer.encode(" ".join(WORDS[:6]))
            made["targets"] = np.asarray([ids, ids[::-1]])
        return made
    made = {"image": np.stack([processor.image(picture) for picture in pictures])} if "image" in shapes else {}
    return {**made, **({"tokens": processor.texts([" ".join(WORDS), " ".join(WORDS[:4])])} if needs_text else {})}


def drawn(height: int, width: int) -> Any:
    """A picture with edges, colours and a slope."""
    from PIL import Image, ImageDraw
    rows, columns = np.mgrid[:height, :width]
    picture = Image.fromarray(np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1).astype(np.uint8))
    ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(230, 20, 20))
    return picture


def pairs(theirs: Any, ours: Imported, inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, ours, theirs) of everything that both sides compute."""
    generates = hasattr(ours.model, "head")
    yield from (language_pairs if generates else tower_pairs)(theirs, ours, inputs, compiled)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and compares; returns the exit code: 0 within the tolerance, 1 above."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.interop.compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="a directory in the Hugging Face layout")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="random examples; default: 2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return int(not compare(options.folder, options.batch, options.seed) <= TOLERANCE)


if __name__ == "__main__":
    from vlm_jax.errors import VlmError
    try:
        sys.exit(run())
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
