"""The command line: what `harness` on a terminal does. It imports `harness`, never the other way round."""

import sys
from importlib import import_module
from pathlib import Path

# The `harness` that was installed with this package, whatever else of that name PYTHONPATH leads to first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import_module("harness")
del sys.path[0]
