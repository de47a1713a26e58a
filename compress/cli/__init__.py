"""Parsing and printing only."""

from compress.cli.commands import main

__all__ = ["main"]
