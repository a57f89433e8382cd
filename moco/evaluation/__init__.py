"""Evaluation of encoders: kNN, linear classification, fine-tuning with few labels, SVMs."""
