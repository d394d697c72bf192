"""The published folder and its card."""
