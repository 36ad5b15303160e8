"""Command-line entry points: parse, load the configuration, call the library, exit with a code."""
