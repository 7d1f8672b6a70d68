"""Sweeps on Ray Tune: spaces, trials that are Ray Train runs, schedulers, searchers, results that can be read again."""
