"""The commands: parse, load the configuration, call the library. `skipvar NAME` is `python -m jobs.NAME`."""
