"""The export stage: checkpoint → ONNX components in the standard layout, checked against PyTorch."""
