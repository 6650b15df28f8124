"""fpsc: FP8 block-sparse attention for video diffusion transformers, as a torch.compile backend.

    torch.compile(model, backend="fpsattn")

needs no import of this package. What is here: policies, reports, and the attention itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fpsc.compiling import compile
    from fpsc.exporting import ExportError, export
    from fpsc.functional import attention
    from fpsc.options import OptionError
    from fpsc.policy import Policy, PolicyError
    from fpsc.report import NothingReplacedWarning, Report, reports
    from fpsc.runtime import StructureError, set_policy

# Loaded at first use: `fpsc --help` and the entry point must not wait for torch.
_HOMES = {
    "ExportError": "fpsc.exporting",
    "NothingReplacedWarning": "fpsc.report",
    "OptionError": "fpsc.options",
    "Policy": "fpsc.policy",
    "PolicyError": "fpsc.policy",
    "Report": "fpsc.report",
    "StructureError": "fpsc.runtime",
    "attention": "fpsc.functional",
    "compile": "fpsc.compiling",
    "export": "fpsc.exporting",
    "reports": "fpsc.report",
    "set_policy": "fpsc.runtime",
}

__all__ = [
    "ExportError",
    "NothingReplacedWarning",
    "OptionError",
    "Policy",
    "PolicyError",
    "Report",
    "StructureError",
    "__version__",
    "attention",
    "compile",
    "export",
    "reports",
    "set_policy",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fpsc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
