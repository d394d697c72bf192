"""What leaves the machine: the published folder and its push, search index, ONNX, HTML pages."""
