"""Kernels: where noise comes from. Needs torch and numpy alone."""
