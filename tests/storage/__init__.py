"""Tests of skipvar/shards against a real S3 server."""
