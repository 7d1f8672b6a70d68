"""One script per question; `python -m benchmarks.<name>`, results under `benchmarks/results/`."""
