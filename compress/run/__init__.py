"""A recipe run: read, checked, folded over its passes, kept."""
