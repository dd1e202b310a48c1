"""A training run: its settings, the job made of them, its steps, its folder, and the report at the end."""
