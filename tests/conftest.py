"""Makes `tests/` importable, so that every test finds `fakes.py` and `reference.py`; shared fixtures come here."""
