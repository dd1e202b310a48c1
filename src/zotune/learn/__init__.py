"""Learning to learn: train the networks of a ZO Fine-tuner. With `baselines` the only room that uses autograd."""
