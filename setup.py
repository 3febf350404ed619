"""Build entry: metadata stands in pyproject.toml, sources and flags in CMakeLists.txt."""

from scikit_build_core.setuptools.wrapper import setup

setup(cmake_source_dir=".")
