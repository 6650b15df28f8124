"""`fpsc policy init`: a policy to start from, with comments on what else it can say."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpsc.cli.errors import UserError
from fpsc.cli.policy.output import target_of, write

if TYPE_CHECKING:
    from fpsc.policy import Policy

HEAD = """\
# yaml-language-server: $schema=fpsc-policy-1.json
# ("fpsc policy schema > fpsc-policy-1.json" puts that file here; editors then complete and check.)
# Started from the built-in policy {preset}. "fpsc policy check FILE" finds mistakes.
#
"""

OFFERED = {
    "for": """\
for:                          # what it was tuned on; elsewhere a warning says so
  model: owner/name
  grid: [21, 45, 80]          # latent frames, height, width, in tokens
""",
    "except": """\
except:                       # other modes for some layers, heads or noise; later lines win
  - {{layers: [0, 1], use: {first}}}
  - {{layers: 12..18, heads: [3, 7], noise: 0.90..0.40, use: {last}}}
""",
    "sampling": """\
sampling: {{scheduler: UniPCMultistepScheduler, steps: 50, shift: 5.0}}
                              # with it, "steps: 0..10" or "percent: 0..20" in place of noise
""",
    "components": """\
components:                   # where a pipeline has two transformers
  transformer_2:
    schedule:
      - {{noise: 1.00..0.00, use: {last}}}
""",
}
"""By key, what a policy can say beyond what it says."""


def init(
    family: Annotated[
        str, typer.Argument(help="A built-in policy, or the class of a model (or how it begins).")
    ] = "generic",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help='The file; default NAME.yaml; "-" prints it.'),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a commented policy for a family of models, to be edited."""
    from fpsc.policy import Policy, find

    preset = _preset(family)
    target = target_of(output or f"my-{preset}.yaml", force)
    name = target.stem if target else f"my-{preset}"
    started = find(preset).with_values({"name": name})
    text = HEAD.format(preset=preset) + started.document.text + _offers(started)
    policy = Policy.load(text)
    if json and target is None:
        raise UserError("--json and --output - both want standard output; choose one")
    write(policy, target)
    if json:
        typer.echo(jsonlib.dumps({"file": str(target), "preset": preset, "name": name}))
    elif target is not None:
        typer.echo(f"{Path(target)} written, from {preset}")


def _offers(policy: "Policy") -> str:
    """As comments, what this policy does not say yet."""
    uses = {"first": policy.schedule[0].use, "last": policy.schedule[-1].use}
    offers = [o.format(**uses) for key, o in OFFERED.items() if key not in policy.document.value]
    blocks = ['What else a policy can say; take the "# " away to use it.\n', *offers]
    return "\n" + "#\n".join("".join(f"# {line}\n" for line in b.splitlines()) for b in blocks)


def _preset(family: str) -> str:
    """The built-in policy for a name of one, or for the class of a model."""
    from fpsc.families import FAMILIES, Family
    from fpsc.policy import presets
    from fpsc.policy.errors import either, listed, nearest

    if family in presets():
        return family
    wanted = family.lower()
    known = {prefix.lower(): entry for prefix, entry in FAMILIES.items()}
    found = [p for p in known if wanted.startswith(p)]
    found += [p for p in known if p.startswith(wanted) and wanted]
    for prefix in found[:1]:
        entry = known[prefix]
        if isinstance(entry, Family):
            return entry.policy
        sizes = [n for n in presets() if n.startswith(f"{prefix}-") and not n.endswith("-tuned")]
        if sizes:  # the class alone does not tell
            raise UserError(f"{family} comes in several sizes; choose {either(sizes)}")
        return "generic"
    names = [*presets(), *FAMILIES]
    raise UserError(f"no family {family}{nearest(family, names)} (known: {listed(names)})")
