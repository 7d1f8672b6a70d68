"""Continuous batching over a paged latent KV cache. No Ray, no HTTP."""
