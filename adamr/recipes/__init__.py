"""Optimizers by the names users know."""
