"""The deployment files, and what they start."""
