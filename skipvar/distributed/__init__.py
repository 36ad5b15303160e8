"""Driver and replicas on Ray: the only package that imports it."""
