"""The networks as ONNX graphs: written by torch, run without it."""
