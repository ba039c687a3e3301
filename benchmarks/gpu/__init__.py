"""The GPU runbook: what has to be true on a real NVIDIA GPU, measured there stage by stage (docs/gpu.md)."""
