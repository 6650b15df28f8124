"""The policy: which attention runs how, as a file that people read, and as tensors for kernels.

`find` or `Policy.load` gives a policy; `resolve` makes its table for a model, `plan` its lists for
the tiles of a sequence. `fpsc.policy.resolve` is that function and hides the module of the same
name as an attribute; what else the module has comes by `from fpsc.policy.resolve import ROWS`.
"""

from .errors import PolicyError
from .imports import presets
from .load import Policy
from .lookup import find
from .resolve import Plan, Table, plan, resolve

__all__ = [
    "Plan",
    "Policy",
    "PolicyError",
    "Table",
    "find",
    "plan",
    "presets",
    "resolve",
]
