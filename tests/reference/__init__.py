"""Readable twins: the methods written as plain loops, for comparison."""
