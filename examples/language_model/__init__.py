"""The next byte of Python: a transformer that reads the standard library's sources."""
