"""MoCo pretraining: methods, data path, training and evaluation. Never imports `detection`."""
