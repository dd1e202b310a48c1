"""ZO, the torch optimizer, and what it is made of: the two halves of a step, folding, saving, replaying."""
