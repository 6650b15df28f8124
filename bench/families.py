"""What becomes of every video transformer that diffusers ships: docs/families.md.

    python bench/families.py            # writes the page
    python bench/families.py --check    # fails where the page is not what would be written
    python bench/families.py --inductor # prints the table with every graph compiled by Inductor

The tiny models of tests/families.py go through noise levels and resolutions (bench/family_runs.py).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import torch  # noqa: E402
from torch import fx  # noqa: E402

from bench.family_runs import GRIDS, run, timestep_of  # noqa: E402
from fpsc.families import family_of  # noqa: E402
from fpsc.grid import TokenGrid  # noqa: E402
from fpsc.passes import manager  # noqa: E402
from fpsc.passes.infer_grid import Hints  # noqa: E402
from fpsc.report import Site, sites_of  # noqa: E402
from fpsc.roots import argument_names, bind, latent_grids, latent_of  # noqa: E402
from tests.families import MODELS, Model  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
WORST = 1e-4  # relative RMS against eager in float32

HEADER = """# Video transformers of diffusers

Written by `python bench/families.py` with diffusers {diffusers} and torch {torch}; the tests check
that it is up to date. Tiny models under full compile, one batch element, float32.

- **replaced**: attentions on token grid {grid}. Where another grid compiled again and fewer were
  replaced, that number follows.
- **compiles**: graphs that Dynamo compiled in the first call; at four other timesteps; on grid
  {second}, where it takes sizes for dynamic; on {third}; and back on the first.
- **error**: relative RMS against eager over all of these calls, everything dense, rewritten graphs
  run with the CPU kernel and without Inductor. `python bench/families.py --inductor` is the same
  with it.
- **grid from**: `graph` is the model's own reshapes; `latent` the shape of its input, where the
  graph breaks ahead of the attention; `options` what the user stated.
- **timestep**: the argument, and the convention by which it becomes a noise level. Where that is
  open, `options={{"timestep": {{"convention": ...}}}}` states it.

With Triton kernels the norms and rotary embeddings of queries and keys become a part of the op in
the families of Wan, HunyuanVideo, CogVideoX and LTX, and in every other whose graph can be read. In
Allegro and Kandinsky they stay in the graph: `fpsc.reports()` says why ([more](kernels.md)).

| class | replaced | compiles | error | grid from | timestep | left dense |
|---|---|---|---|---|---|---|
"""


@dataclass
class Found:
    """What the passes say of one model.

    Attributes:
        graphs: number of graphs, with the model's `flags` set.
        timestep: argument that holds it, with its number of axes; None where no graph has it.
        convention: of its class; "" when it is open.
    """

    graphs: int
    sites: list[Site]
    timestep: str | None
    convention: str


def analyse(
    model: Model,
    grid: tuple[int, int, int],
    options: Mapping[str, Any] | None = None,
    **given: Any,
) -> Found:
    """Capture a tiny model and analyse its graphs.

    Args:
        options: `grid`, as the backend takes it.
        given: arguments of forward that replace the model's own.
    """
    built = model.build(grid)
    stated = (model.options(TokenGrid(*grid)) if options is None else options).get("grid")
    hints = Hints((stated,), "options") if stated else None
    names = argument_names(built)
    inputs = {**model.inputs(grid), **given}
    graphs = _capture(built, inputs, model.flags)
    latent = latent_of(bind(built, (), inputs))
    found = Found(len(graphs), [], None, "")
    family = family_of(built)
    found.convention = family.convention if family else ""
    for index, gm in enumerate(graphs):
        if index and latent is not None and not stated:  # the first one tells the later ones
            hints = Hints(tuple(latent_grids(built, latent.shape)), "latent")
        analysis = manager.analyse(gm, hints, None, names)
        manager.read_fronts(analysis)
        found.sites += sites_of(analysis)
        if analysis.timestep is not None:
            found.timestep = timestep_of(analysis, names)
    return found


def _capture(
    model: torch.nn.Module, inputs: dict[str, Any], flags: dict[str, bool]
) -> list[fx.GraphModule]:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(**flags):
        torch.compile(model, backend=keep)(**inputs)
    return graphs


def row(model: Model, *, inductor: bool = False) -> str:
    """A row of the table."""
    found = run(model.key, inductor=inductor)
    sites = found.stages[0].sites
    replaced = [s for s in sites if s.replaced]
    fewest = min(s.replaced for s in found.stages if s.sites)
    then = f", then {fewest}" if fewest < len(replaced) else ""
    first, *others = found.stages
    compiles = ", ".join(
        str(n) for n in (first.compiles, first.later, *(s.compiles for s in others))
    )
    if model.flags:
        compiles += " with " + ", ".join(f"`{flag}`" for flag in model.flags)
    origin = ", ".join(dict.fromkeys(s.grid_source for s in replaced))
    left = Counter((s.role, s.reason.split("; ")[0]) for s in sites if not s.replaced)
    dense = "<br>".join(f"{n} {role}: {reason}" for (role, reason), n in left.items())
    family = family_of(model.build(GRIDS[0]))
    timestep = f"{found.timestep or 'in no graph'}; {family.convention if family else 'open'}"
    name = model.key.replace("/", ", ")
    error = _rounded(found.error) if replaced else ""
    return (
        f"| {name} | {len(replaced)}{then} | {compiles} | {error} | {origin} | {timestep} | "
        f"{dense} |\n"
    )


def _rounded(error: float) -> str:
    """An error as a bound, which is the same on every machine."""
    bound = next((b for b in (1e-5, WORST) if error <= b), None)
    return f"<= {bound:.0e}" if bound else f"{error:.0e}"


def page(*, inductor: bool = False) -> str:
    """The whole page."""
    grid, second, third, _ = (" x ".join(map(str, grid)) for grid in GRIDS)
    header = HEADER.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        grid=grid,
        second=second,
        third=third,
    )
    return header + "".join(row(model, inductor=inductor) for model in MODELS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the page that is there")
    parser.add_argument("--inductor", action="store_true", help="compile the rewritten graphs")
    given = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    text = page(inductor=given.inductor)
    if given.inductor:
        print(text)
        return int(any(run(m.key, inductor=True).error > WORST for m in MODELS))
    if given.check:
        if text != PAGE.read_text(encoding="utf-8"):
            print(f"{PAGE} is not up to date: run python bench/families.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
