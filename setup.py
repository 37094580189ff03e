"""Builds the compiled core with CMake and Ninja; everything that is plain metadata is in pyproject.toml.

The core is a top-level module beside the package, so that the source folder in the current
directory never hides it. Without a C++ compiler the package installs without it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildCore(build_ext):
    """Runs CMake on csrc/; a failure is a warning, since the extension is optional."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext`` where setuptools expects it."""
        source = Path(__file__).parent.resolve() / "csrc"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # never an older one
        with tempfile.TemporaryDirectory() as build:
            self._run_cmake(source, build, target)

    def _run_cmake(self, source: Path, build: str, target: Path) -> None:
        configure = [
            *("cmake", "-S", source, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSUPCON_VERSION={self.distribution.get_version()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the core was not built, the package works without it: {error}"
            ) from error


setup(
    ext_modules=[Extension("_supcon_kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildCore},
)
