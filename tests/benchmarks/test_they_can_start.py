"""Benchmarks run for minutes and rarely; that what they import is still there is seen here."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks
import benchmarks.sections

MODULES = [
    module.name
    for package in (benchmarks, benchmarks.sections)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_everything_it_imports_is_there(name: str) -> None:
    importlib.import_module(name)
