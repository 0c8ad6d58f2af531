"""Augmentations of whole batches on their device: each image by its own draws, to Pillow's result in 256 levels."""
