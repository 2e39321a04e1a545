"""Converts weights: `python -m vlm_jax.convert --from hf|big_vision|workdir --to hf SRC DST`.

    hf          a directory in the Hugging Face layout: config.json, safetensors, tokenizer and processor files
    big_vision  an .npz of SigLIP or PaliGemma; --processor DIR takes tokenizer and preprocessing from a directory or run
    workdir     a run of vlm_jax (--step chooses one of its checkpoints)

Without --from the kind is told by what SRC is. Nothing is unpickled: .bin, .pt and .ckpt files are refused.
"""
import argparse
from collections.abc import Sequence
import dataclasses
import os
from typing import Any

from vlm_jax import command_line
from vlm_jax.errors import ConfigError

KINDS = ("hf", "big_vision", "workdir")
_PADDING = 64   # tables of the releases have a multiple of so many rows


def run(arguments: Sequence[str] | None = None) -> str:
    """Parses the command line, converts, prints what was written; returns the target folder."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.convert", description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__.partition("\n\n")[2])
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="what SRC is; default: what it looks like")
    parser.add_argument("--to", default="hf", choices=("hf",), help="the layout of DST; default: hf")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of a workdir; default: the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="what floating-point weights become; default: what they are")
    parser.add_argument("--processor", metavar="DIR", help="take tokenizer and preprocessing from this directory or run")
    parser.add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="the largest file; default: 5")
    options, overrides = command_line.parse(parser, arguments)
    if overrides:
        raise ConfigError(f"--config.{overrides[0]}: this command takes no config; leave it out.")
    if options.shard_gb <= 0:
        raise ConfigError(f"--shard_gb {options.shard_gb}: give a positive size.")
    from vlm_jax.interop.directory import parameter_bytes
    from vlm_jax.restore import save
    loaded = load_any(options.source, options.kind, options.step, options.dtype)
    if options.processor:
        loaded = with_processor(loaded, options.processor)
    if os.path.realpath(os.path.expanduser(options.source)) == os.path.realpath(os.path.expanduser(options.target)):
        raise ConfigError(f"{options.target}: source and target are the same folder; name another target.")
    save(loaded, options.target, options.to, shard_bytes=int(options.shard_gb * 1e9))
    print(f"{options.target}: {loaded.config['model']['name']}, {parameter_bytes(loaded.params) / 1e6:,.1f} MB of parameters")
    return options.target


def load_any(source: str, kind: str | None = None, step: int | None = None, dtype: str | None = None) -> Any:
    """Loads a run, a directory or an .npz as a `Loaded`.

    Raises:
      ConfigError: for arguments that are not for this kind.
      CheckpointError: for what cannot be read.
    """
    from vlm_jax.interop.config_reader import is_directory
    from vlm_jax.restore import Loaded, load
    if source.endswith(".npz") and kind not in (None, "big_vision"):
        raise ConfigError(f"{source}: this is an .npz of big_vision, not what --from {kind} says; leave --from out.")
    kind = kind or ("big_vision" if source.endswith(".npz") else None)
    if kind == "big_vision":
        from vlm_jax.interop.directory import load_npz
        if step is not None:
            raise ConfigError(f"--step {step}: {source} is no run and has no steps; leave --step out.")
        made = load_npz(source, dtype)
        return Loaded(made.model, made.params, made.processor, made.config, 0, made.files)
    found = "hf" if is_directory(os.path.expanduser(source)) else "workdir"
    if kind is not None and kind != found:
        raise ConfigError(f"{source}: this is a {'directory (hf)' if found == 'hf' else 'workdir'}, not what --from {kind} says; leave --from out.")
    if found == "hf":
        return load(source, step, dtype=dtype)
    loaded = load(source, step)
    return loaded if dtype is None else _cast(loaded, dtype)


def _cast(loaded: Any, dtype: str) -> Any:
    import jax
    import jax.numpy as jnp
    params = jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, loaded.params)
    return dataclasses.replace(loaded, params=params)


def with_processor(loaded: Any, folder: str) -> Any:
    """`loaded` with the processor and the files of another directory or run."""
    from vlm_jax.interop.config_reader import is_directory
    if is_directory(folder):
        from vlm_jax.interop.directory import read_files
        from vlm_jax.interop.processors import read_processor
        loaded = _with_image_token(loaded, folder)
        return dataclasses.replace(loaded, processor=read_processor(folder, loaded.model, {}), files=read_files(folder))
    from vlm_jax.data.processor import Processor
    return dataclasses.replace(loaded, processor=Processor.load(os.path.join(folder, "processor.json")), files={})


def _with_image_token(loaded: Any, folder: str) -> Any:
    """PaliGemma with a row for <image>, which the tokenizers of directories have and big_vision's tables lack: rows are added up to a multiple of 64, each
    the mean of all, whose logit is never the largest. Other models as they are."""
    if loaded.config["model"]["name"] != "paligemma" or "hf" in loaded.config:
        return loaded
    import jax.numpy as jnp

    from vlm_jax import registry
    from vlm_jax.data.tokenizers import load_tokenizer
    settings, table = loaded.config["model"], loaded.params["language"]["token_embedding"]
    number = load_tokenizer({"path": folder}).token_id("<image>")
    if number is None or not len(table) <= number < len(table) + _PADDING:
        return loaded
    rows = -(-(number + 1) // _PADDING) * _PADDING
    mean = table.astype(jnp.float32).mean(0, keepdims=True).astype(table.dtype)
    params = {**loaded.params, "language": {**loaded.params["language"], "token_embedding": jnp.concatenate([table, *[mean] * (rows - len(table))])}}
    settings = {**settings, "language": {**settings["language"], "vocab_size": rows}}
    model = registry.build(**settings, dtypes={"params": loaded.model.param_dtype, "compute": loaded.model.dtype})
    return dataclasses.replace(loaded, model=model, params=params, config={**loaded.config, "model": settings})


if __name__ == "__main__":
    command_line.main(run)
