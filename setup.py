"""Only what setup.cfg cannot say: the compiled kernels, which the package does without where nothing compiles."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "mpi_kernels._native",
            sources=sorted(map(str, Path("mpi_kernels/native").glob("*.c"))),
            depends=sorted(map(str, Path("mpi_kernels/native").glob("*.h"))),
            # no -ffast-math: sums of floats have a fixed order.  Instruction sets are chosen at run time.
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
