"""Studies and benchmarks, one folder each. Importing one first tells an idle libtpu what it would complain of; jax comes later."""
from vlm_jax.absent_tpu import quiet_libtpu

quiet_libtpu()
