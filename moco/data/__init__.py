"""The data path: find and decode images, augment them, order them, load them in batches."""
