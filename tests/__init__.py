"""Tests, by what they prove: math, contracts, invariance, kernels. `checks` holds the claims that mutations must break."""
