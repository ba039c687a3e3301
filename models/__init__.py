"""The embedded models, each a folder with its weights, recipe and model card."""
