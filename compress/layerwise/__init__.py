"""Methods that take one layer after another: quantizing, pruning, and what both aim at."""
