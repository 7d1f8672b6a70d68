"""From text to packed, memory-mapped token blocks."""
