"""The core: sites, noise, directions, weights, the step and the ledger. Needs torch and numpy alone."""
