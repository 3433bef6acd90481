"""Keeps theta: filters and aggregates meta-gradients, takes meta-steps, checkpoints."""
