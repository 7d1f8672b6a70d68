"""Which shard computes which expert: pure functions."""
