"""Distributed image generation with Infinity models, skipping late scales per image (SkipVAR, arXiv 2506.08908)."""

__version__ = "0.1.0"
