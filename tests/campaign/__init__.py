"""What a program meets outside a test suite, many times over: see `__main__.py`."""

import sys
from pathlib import Path

# the modules beside this package that make tiny models, texts and recipes, by whichever way it is run
_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
