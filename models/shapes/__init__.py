"""`shapes`: a small latent diffusion model in the Stable Diffusion layout, trained on drawn scenes."""
