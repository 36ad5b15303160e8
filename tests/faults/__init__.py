"""Whole jobs under faults: killed, cut off, doubled, refused."""
