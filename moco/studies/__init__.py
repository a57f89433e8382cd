"""Studies: pretraining runs that differ in named keys, and one table of their results."""
