"""Builds the one file of C, with threads where the compiler knows OpenMP; pyproject.toml says the rest."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError


class Build(build_ext):
    """Tries with OpenMP, then without; `optional` then lets undertow install without the extension."""

    def build_extension(self, ext: Extension) -> None:
        try:
            ext.extra_compile_args, ext.extra_link_args = ["-O3", "-fopenmp"], ["-fopenmp"]
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = ["-O3"], []
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[Extension("undertow._walk", ["src/undertow/_walk.c"], py_limited_api=True, optional=True)],
)
