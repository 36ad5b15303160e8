"""What `jobs/bench.py` measures. It stands beside the product: nothing of the product imports it."""
