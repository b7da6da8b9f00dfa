"""Eight CPU devices, strict promotion of ranks: set before the backend starts.

A worker drops its compiled programs now and then.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Small eigenvalue problems: threads of two workers on two cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("adamr", deadline=None, print_blob=True)
hypothesis.settings.load_profile("adamr")

_finished = 0


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs hold memory maps, of which a process may have 65 530."""
    global _finished
    _finished += 1
    if _finished % 150 == 0:
        jax.clear_caches()
