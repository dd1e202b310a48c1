"""The compiled noise kernels: built where there is a C compiler, left out (and the install succeeds) where there is none."""

from glob import glob

from setuptools import Extension, setup

FLAGS = [
    "-O3",
    "-ffp-contract=off",  # products are rounded before they are added: the same bits everywhere
    "-fno-fast-math",
]

setup(
    ext_modules=[
        Extension(
            "zotune.kernels._native",
            ["src/zotune/kernels/native.c"],
            depends=sorted(glob("src/zotune/kernels/native_*.h")),
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)
