"""Export: a run's heads, and where it can be its encoders too, as ONNX graphs with a model card."""
