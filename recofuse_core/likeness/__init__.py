"""What both cameras see alike, learnt: the network behind `recofuse_rigs/cues_*.onnx`, and how it is taught."""
