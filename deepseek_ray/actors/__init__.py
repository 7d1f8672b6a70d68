"""Thin Ray shells around the engine, the experts and the decisions."""
