"""Batches requests through the model: prefix, probe, policy, bucket, suffix, decode."""
