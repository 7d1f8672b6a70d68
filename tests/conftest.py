"""Makes `tests/` importable, so that every test finds `fakes.py` and `reference.py`; shared fixtures come here."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
