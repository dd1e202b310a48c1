"""Learned optimizers of the ZO Fine-tuner: one small network per tensor, which says how strongly to perturb it."""
