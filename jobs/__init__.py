"""What `ray job submit` names: `python -m jobs.generate` and so on, each a few lines over `skipvar.cli`."""
