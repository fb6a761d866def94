"""`pl`: the Lightning that this process trains with. Both packages offer the same names; a user imports one of them."""

from __future__ import annotations

import importlib
import os
from typing import Any

VARIABLE = "TEST_LIGHTNING_NAMESPACE"
MODULES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}

pl: Any = importlib.import_module(MODULES[os.environ.get(VARIABLE, "lightning")])
