"""Metrics (level 4): feature networks, moments and distances between sets of images; knows no diffusion."""
