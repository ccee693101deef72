"""ImageRL: reinforcement-learning post-training for image generators, half autoregressive and half flow matching."""
