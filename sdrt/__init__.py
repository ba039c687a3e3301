"""sdrt: compiled inference for Stable Diffusion."""
