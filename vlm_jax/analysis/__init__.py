"""Programs compiled ahead of time, for hardware that need not be there: memory, FLOPs, collectives, roofline, warnings.

`python -m vlm_jax.compile` prints what `report.analyse` finds.
"""
