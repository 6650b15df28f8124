"""The pictures of docs/: what `fpsc policy show --png` draws, and one of every pattern.

python bench/pictures.py    # rewrites docs/pictures/
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fpsc.policy import Policy, find  # noqa: E402
from fpsc.policy.accounting import account  # noqa: E402
from fpsc.policy.axis import levels  # noqa: E402
from fpsc.policy.models import MODELS  # noqa: E402
from fpsc.policy.patterns import Pattern  # noqa: E402
from fpsc.policy.pictures import patterns_figure, policy_figure, save  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"

CROSS = ((0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0))

PATTERNS = {
    "dense": Pattern("dense"),
    "window: [3, 3, 5]": Pattern("window", window=(3, 3, 5)),
    "near, keep: 0.2": Pattern("near", 0.2),
    "near, keep: 0.2, weights: [4, 1, 1]": Pattern("near", 0.2, weights=(4.0, 1.0, 1.0)),
    "frame": Pattern("frame"),
    "column, keep: 0.1": Pattern("column", 0.1),
    "radial, keep: 0.2": Pattern("radial", 0.2),
    "explicit, offsets of the 6 neighbours": Pattern("explicit", offsets=CROSS),
}


def example() -> Policy:
    """The policy that docs/policy.md explains."""
    text = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return Policy.load(next(block for block in blocks if block.startswith("fpsc: 1")))


def main() -> None:
    size = MODELS["wan-2.1-14b"]
    noise = levels(size.sampling)
    for name, policy in (("policy", example()), ("tuned", find("wan-2.1-14b-tuned"))):
        save(policy_figure(account(policy, size, noise), noise), str(FOLDER / f"{name}.png"))
    save(patterns_figure(PATTERNS), str(FOLDER / "patterns.png"))


if __name__ == "__main__":
    main()
