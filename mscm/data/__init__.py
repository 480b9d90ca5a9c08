"""Data (level 4): sources of uint8 images, the batches of a step, and transforms that run on the device."""
