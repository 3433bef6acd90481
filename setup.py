"""Builds the CPU kernels where there is a compiler; without one everything works, slower (``paceline doctor`` says so).

Everything else about the package is in pyproject.toml.
"""

from glob import glob

from setuptools import Extension, setup

BUILDS = ("", "_portable", "_avx2", "_avx512")


def kernels(module: str, folder: str, name: str) -> Extension:
    """The library ``module`` of ``folder``: an entry point, and one build per instruction set."""
    return Extension(
        module,
        sources=[f"{folder}/{name}{build}.cpp" for build in BUILDS],
        depends=[*glob("lopt/kernels/*.h"), *glob("worker/fused/*.h")],
        extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-pthread"],
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )


setup(
    ext_modules=[
        kernels("lopt.kernels._rules", "lopt/kernels", "rules"),
        kernels("worker.fused._window", "worker/fused", "window"),
    ]
)
