"""Prompts in, Parquet out: units, schema, storage, resume."""
