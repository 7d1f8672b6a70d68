"""Decisions as plain objects: state and event in, decision out. No I/O."""
