"""Optimiser, averaged parameters and the one training step; knows parameters, not what they compute."""
