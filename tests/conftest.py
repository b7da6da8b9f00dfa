"""Eight CPU devices, strict promotion of ranks, and programs that compile fast.

The environment is set before the backend starts; workers and subprocesses inherit it.
Default tests spend their time on compiling small programs. They leave out LLVM's
optimizations and XLA's newer fusions and make one module of a program, which takes a
quarter of the time. Slow tests compile as users do, and so does a test marked
`as_users`, in a process of its own; with `XLA_FLAGS=--xla_backend_optimization_level=3`
all do. A worker drops its compiled programs now and then.
"""

import os
import subprocess
import sys

LEVEL = "--xla_backend_optimization_level="
FAST = (
    f"{LEVEL}0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)

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


def pytest_configure(config):
    if config.option.markexpr != "slow" and LEVEL not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {FAST}"


def pytest_pyfunc_call(pyfuncitem):
    flags = os.environ["XLA_FLAGS"]
    if FAST not in flags or not pyfuncitem.get_closest_marker("as_users"):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-n0", pyfuncitem.nodeid]
    environment = {**os.environ, "XLA_FLAGS": flags.replace(FAST, f"{LEVEL}3")}
    root = pyfuncitem.config.rootpath
    child = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return True


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs hold memory maps, of which a process may have 65 530."""
    global _finished
    _finished += 1
    if _finished % 150 == 0:
        jax.clear_caches()
