"""Measurements of pretraining; `tools/benchmark.py` is their command line."""
