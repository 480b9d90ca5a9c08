"""Losses, one value per example, as functions of denoisers; no parameters, no optimiser, no config."""
