"""The embedded model's data and training."""
