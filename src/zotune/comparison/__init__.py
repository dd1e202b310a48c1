"""Contestants at equal forward passes, in one table with a verdict."""
