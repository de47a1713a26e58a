"""What a program meets outside a test suite, many times over: see `__main__.py`."""
