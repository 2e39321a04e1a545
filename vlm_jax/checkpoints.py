"""Looks after the checkpoints of a run: `python -m vlm_jax.checkpoints {list,verify,diff,delete} WORKDIR`.

    list WORKDIR                            steps, when they were saved, how large they are, which one is the last known to be good
    verify WORKDIR [--step N]               reads every array and compares its digest; ends with 73 where something is damaged
    diff WORKDIR STEP STEP [--other DIR]    how two steps, of one run or two, differ: arrays, settings of the run; reads no array
    delete WORKDIR --step N [--force]       deletes a step; refuses while a trainer runs, and to delete the last good one without --force
"""
import argparse
from collections.abc import Sequence
import time

from vlm_jax import command_line
from vlm_jax.errors import CheckpointError, ConfigError


def run(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and prints; returns the number of steps listed, verified, deleted, or of the lines that differ."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.checkpoints", description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__.partition("\n\n")[2])
    parser.add_argument("command", choices=("list", "verify", "diff", "delete"))
    parser.add_argument("workdir", metavar="WORKDIR", help="the run, or its checkpoints folder")
    parser.add_argument("steps", metavar="STEP", type=int, nargs="*", help="two steps, for diff")
    parser.add_argument("--step", type=int, metavar="N", help="the one step to verify or delete")
    parser.add_argument("--other", metavar="DIR", help="diff: the run that the second step is of")
    parser.add_argument("--force", action="store_true", help="delete: even the last good step")
    options, overrides = command_line.parse(parser, arguments)
    if overrides:
        raise ConfigError(f"--config.{overrides[0]}: this command takes no config; leave it out.")
    if (options.command == "diff") != (len(options.steps) == 2) or (options.steps and options.command != "diff"):
        raise ConfigError(f"{options.command}: give two steps to diff, as in `diff WORKDIR 100 200`, and none to the other commands (they have --step).")
    if options.command == "list":
        return list_steps(options.workdir)
    if options.command == "verify":
        return verify(options.workdir, options.step)
    if options.command == "diff":
        return diff(options.workdir, options.steps[0], options.other or options.workdir, options.steps[1])
    if options.step is None:
        raise ConfigError("delete: which step? add --step N.")
    return delete(options.workdir, options.step, options.force)


def list_steps(workdir: str) -> int:
    """Prints a line a step, and returns how many there are."""
    from vlm_jax.training.checkpoint_format import Damaged, num_bytes, read_meta
    checkpoints = _open(workdir)
    steps, good = checkpoints.steps(), checkpoints.last_good()
    for step in steps:
        try:
            meta = read_meta(checkpoints.folder / str(step))
            leaves = meta["leaves"].values()
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(meta["saved_at"]))
            print(f"{step:>10}  {when}  {len(leaves):>6} arrays  {sum(map(num_bytes, leaves)) / 1e6:>12,.1f} MB{'  last good' if step == good else ''}")
        except Damaged as damage:
            print(f"{step:>10}  damaged: {damage}")
    if not steps:
        print(f"{checkpoints.folder}: no checkpoint")
    return len(steps)


def verify(workdir: str, step: int | None = None) -> int:
    """Reads and compares all arrays of all steps, or of one; prints a line a step. Raises a CheckpointError naming the damaged steps."""
    from vlm_jax.training.checkpoint_arrays import verify as verify_arrays
    from vlm_jax.training.checkpoint_format import Damaged, complete, read_meta
    checkpoints = _open(workdir)
    damaged, sound = [], 0
    for candidate in sorted(checkpoints.candidates(step)):
        path = checkpoints.folder / str(candidate)
        try:
            leaves = read_meta(path)["leaves"]
            verify_arrays(path, leaves)
            sound += 1
            print(f"{candidate}: sound, {len(leaves)} arrays")
        except Damaged as damage:
            if not complete(path):
                print(f"{candidate}: deleted meanwhile")
                continue
            damaged.append(candidate)
            print(f"{candidate}: DAMAGED: {damage}")
    if damaged:
        raise CheckpointError(f"{checkpoints.folder}: damaged: {', '.join(map(str, damaged))}; training goes on from the newest sound one, or delete them: "
                              f"python -m vlm_jax.checkpoints delete {workdir} --step {damaged[0]}")
    return sound


def diff(workdir: str, step: int, other: str, other_step: int) -> int:
    """Prints the +/- lines between two steps and how many arrays have other values; returns the number of lines and arrays."""
    from vlm_jax.training.checkpoint_format import Damaged, difference, read_meta
    from vlm_jax.training.run_identity import lines_between
    metas = []
    for folder, number in ((workdir, step), (other, other_step)):
        checkpoints = _open(folder)
        checkpoints.candidates(number)
        try:
            metas.append(read_meta(checkpoints.folder / str(number)))
        except Damaged as damage:
            raise CheckpointError(f"{checkpoints.folder}/{number}: {damage}; choose another step.") from damage
    one, two = metas
    lines = lines_between(one["metadata"].get("run") or {}, two["metadata"].get("run") or {})
    lines += difference(*({name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in meta["leaves"].items()} for meta in metas), separator=" ")
    both = [name for name in one["leaves"] if name in two["leaves"] and one["leaves"][name]["shape"] == two["leaves"][name]["shape"]]
    changed = [name for name in both if one["leaves"][name]["digest"] != two["leaves"][name]["digest"]]
    print("\n".join(lines) if lines else "the same run and the same arrays by path, shape and dtype")
    print(f"{len(changed)} of {len(both)} arrays that both have differ in their values{': ' if changed else ''}{', '.join(changed[:8])}"
          f"{', ...' if len(changed) > 8 else ''}")
    return len(lines) + len(changed)


def delete(workdir: str, step: int, force: bool = False) -> int:
    """Deletes a step, holding the lock of the workdir. Raises a CheckpointError where a trainer runs, or for the last good step without `force`."""
    import os

    from vlm_jax.training.checkpoint_policy import delete_step
    from vlm_jax.training.locks import WorkdirLock
    checkpoints = _open(workdir)
    checkpoints.candidates(step)
    with WorkdirLock(os.path.dirname(str(checkpoints.folder))):
        if step == checkpoints.last_good() and not force:
            raise CheckpointError(f"{checkpoints.folder}: step {step} is the last one known to be good; add --force to delete it all the same.")
        delete_step(checkpoints.folder, step)
    print(f"deleted {checkpoints.folder}/{step}")
    return 1


def _open(workdir: str):
    from vlm_jax.training.checkpoints import Checkpoints, steps_folder
    return Checkpoints(steps_folder(workdir))


if __name__ == "__main__":
    command_line.main(run)
