"""Records in, pages out: nothing here measures, and nothing here imports torch."""

from compress.report.page import compare, render

__all__ = ["compare", "render"]
