"""What leaves the machine: the published folder, its push to the Hub, search index, ONNX and HTML pages."""
