"""Compiled peak memory per device of a SigLIP training step, one switch at a time."""
