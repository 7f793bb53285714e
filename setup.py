"""Builds graphcache._C against the torch that is installed; everything else is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    # An isolated build would have to download a torch of its own: gigabytes, and the wrong ABI.
    sys.exit(
        "\ngraphcache is built against the torch that it will run with, and this build can't import "
        "one.\nIf torch is installed, pip hid it from the build (build isolation). Run:\n\n"
        "    pip install 'setuptools>=77' torch        # unless they are there already\n"
        "    pip install --no-build-isolation .\n"
    )

# Two units include all the others: torch's headers take longer to read than our sources to compile.
UNITS = sorted(Path("csrc").glob("*.cpp"))
FILES = sorted(Path("csrc").glob("*/*.cpp"))
# GRAPHCACHE_SEPARATE=1 compiles each file for itself: slow at first, quick after a change to one.
SOURCES = FILES if os.environ.get("GRAPHCACHE_SEPARATE") == "1" else UNITS
INCLUDED = [*FILES, *Path("csrc").rglob("*.h"), *Path("graphcache/_C").glob("*.h")]


class BuildNative(BuildExtension):
    """Notes the torch version beside the library, to be read when the library itself can't load."""

    def run(self) -> None:
        """Builds, then writes `_built.py` next to what was built."""
        super().run()
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).parent / "_built.py"
            target.write_text(f'TORCH_VERSION = "{torch.__version__}"\n')


setup(
    ext_modules=[
        CppExtension(
            "graphcache._C._native",
            [str(path) for path in SOURCES],
            depends=sorted(map(str, INCLUDED)),
            include_dirs=[str(Path(folder).absolute()) for folder in ("csrc", "graphcache/_C")],
            # No -std: torch's own headers say which they need, and it changes between versions.
            extra_compile_args=["-O2", "-g0", "-fvisibility=hidden"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
