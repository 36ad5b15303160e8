"""Tests over inputs that nobody wrote by hand: hypothesis makes configurations, rows, models and datasets."""
