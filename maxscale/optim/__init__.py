"""Optimizers from Optax, with their state as one flat dict of paths, and learning-rate schedules."""
