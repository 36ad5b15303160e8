"""Comparison with golden tensors of the reference. It stands beside the product: nothing of the product imports it."""
