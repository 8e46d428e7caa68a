"""A shim for tools that still ask for one; everything is in pyproject.toml."""

from setuptools import setup

setup()
