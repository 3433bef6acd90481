"""Builds the CPU kernels where there is a compiler; without one everything works, slower (``paceline doctor`` says so).

Everything else about the package is in pyproject.toml.
"""

from glob import glob

from setuptools import Extension, setup

SOURCES = ("rules.cpp", "rules_portable.cpp", "rules_avx2.cpp", "rules_avx512.cpp")

setup(
    ext_modules=[
        Extension(
            "lopt.kernels._rules",
            sources=[f"lopt/kernels/{name}" for name in SOURCES],
            depends=glob("lopt/kernels/*.h"),
            extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]
)
