"""The passes: one method per file, the file name is the name of the pass."""
