"""The sections of `docs/performance.md`, each from its results file."""
