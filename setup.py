"""Builds the package; everything that is plain metadata stands in pyproject.toml.

A compiled core will be a top-level module beside the package, not inside it: the source folder
in the current directory then never hides it.
"""

from setuptools import setup

setup()
