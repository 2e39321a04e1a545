"""Settings of every test: eight simulated CPU devices, no network, deterministic property tests."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Code quality of compiled programs does not matter in tests; compile time does. Eight devices on two busy cores may be slow to meet in a collective, after
    # 40 seconds XLA would abort the process.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_call_warn_stuck_timeout_seconds=120")
# XLA's pool has one thread a device; while seven wait in a collective, the product that the eighth is computing finds no thread for its parts.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings  # noqa: E402  (the environment comes first)

settings.register_profile("repository", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.load_profile("repository")
