"""What a model is worth: metrics with intervals, calibration, baselines, and what is none of its domain."""
