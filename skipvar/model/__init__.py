"""Infinity's networks in torch: knows no policy, no Ray, no storage."""
