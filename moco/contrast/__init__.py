"""Contrastive losses and the stores of negatives: pure functions and small modules."""
