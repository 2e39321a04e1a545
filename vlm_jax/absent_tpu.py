"""What libtpu, installed to compile ahead of time, is told on a machine without TPUs. This module imports no jax: JAX reads some of it when it is imported."""
from importlib.util import find_spec
import os
from pathlib import Path

# Environment of a process that compiles for an absent TPU: libtpu looks for the machine's metadata server otherwise, and for a lock.
ABSENT_TPU = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
              "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "1"}
_GOOGLE = "0x1ae0"


def quiet_libtpu(devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Tells a libtpu on a machine without TPUs what it would look for in vain and complain of in every program; where there are TPUs, nothing."""
    if find_spec("libtpu") and not any(vendor.read_text().strip() == _GOOGLE for vendor in devices.glob("*/vendor")):
        for key in ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
            os.environ.setdefault(key, ABSENT_TPU[key])
