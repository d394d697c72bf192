"""What a model is worth: metrics, intervals, calibration, OOD pictures, scorecard."""
