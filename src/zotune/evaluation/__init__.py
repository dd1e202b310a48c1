"""How good a model is: options by likelihood, generated answers, lm-evaluation-harness."""
