"""Evaluation of frozen features: extraction and the kNN classifier."""
