"""Detectors of kept libraries: how each is built, its loss with sums and counts, and its outputs as boxes and scores."""
