"""The transfer benchmark: R50-C4 Faster R-CNN fine-tuned from converted weights, in trials."""
