"""Tests of skipvar/shards on local folders."""
