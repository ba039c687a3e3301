"""The contestants, each a process of its own."""
