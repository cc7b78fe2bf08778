"""Export of trained models to ONNX, and to folders for sherpa-onnx."""
