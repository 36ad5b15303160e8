"""The paper: strategies, the probe, and the policies that map one to the other."""
