"""NicheCLIP: fine-tune CLIP on your niche, know when it is wrong, and publish it."""

from nicheclip.classifier import NicheClassifier, Prediction

__all__ = ["NicheClassifier", "Prediction"]
__version__ = "0.1.0"
