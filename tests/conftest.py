"""Eight CPU devices, strict promotion of ranks, and a compiler that is fast to compile.

All of it is set in the environment before the backend starts, so that workers and
subprocesses inherit it. The default tests spend their time compiling small programs:
the compiler skips LLVM's optimizations and the newer fusion emitters and writes one
module per program, which takes a quarter of the time, and no program is compiled twice
by workers of one run. The slow tests compile as users do; the rest does so with
`XLA_FLAGS=--xla_backend_optimization_level=3`. A worker drops its compiled programs now
and then.
"""

import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Small eigenvalue problems: threads of two workers on two cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def add_flags(flags, unless):
    there = os.environ.get("XLA_FLAGS", "")
    if unless not in there:
        os.environ["XLA_FLAGS"] = f"{there} {flags}"


add_flags("--xla_force_host_platform_device_count=8", unless="host_platform_device")

# Made by the first process of a run; the others find the name in the environment.
_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="adamr-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("adamr", deadline=None, print_blob=True)
hypothesis.settings.load_profile("adamr")

_finished = 0


def pytest_configure(config):
    if config.option.markexpr != "slow":
        add_flags(
            "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
            "--xla_cpu_parallel_codegen_split_count=1",
            unless="xla_backend_optimization_level",
        )


def pytest_unconfigure(config):
    if _cache:
        shutil.rmtree(_cache, ignore_errors=True)


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs hold memory maps, of which a process may have 65 530."""
    global _finished
    _finished += 1
    if _finished % 150 == 0:
        jax.clear_caches()
