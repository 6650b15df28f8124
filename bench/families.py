"""What becomes of every video transformer that diffusers ships: docs/families.md.

    python bench/families.py            # writes the page
    python bench/families.py --check    # fails where the page is not what would be written

The tiny models of tests/families.py are captured and analysed: no Inductor, no kernel.
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

from fpsc.families import family_of  # noqa: E402
from fpsc.passes import manager  # noqa: E402
from fpsc.passes.graph import example  # noqa: E402
from fpsc.passes.infer_grid import Hints  # noqa: E402
from fpsc.passes.thread import argument_name  # noqa: E402
from fpsc.report import Site, sites_of  # noqa: E402
from fpsc.roots import argument_names, bind, latent_grids, latent_of  # noqa: E402
from tests.families import ELSEWHERE, MODELS, Model  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
GRID = (3, 4, 5)

HEADER = """# Video transformers of diffusers

Written by `python bench/families.py` with diffusers {version}; the tests check that it is up to
date. Tiny models under full compile, token grid {grid}. "Grid from": `graph` is the model's own
reshapes; `latent` is the shape of its input, where the graph breaks ahead of the attention. The
convention says how the timestep becomes a noise level; where it is open, because one class serves
several, `options={{"timestep": {{"convention": ...}}}}` states it.

| class | graphs | replaced | grid from | timestep | left dense |
|---|---|---|---|---|---|
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
    stated = (options or {}).get("grid")
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
        found.sites += sites_of(analysis)
        if analysis.timestep is not None:
            value = example(analysis.timestep)
            assert isinstance(value, torch.Tensor)
            found.timestep = f"{argument_name(analysis.timestep, names)}, {value.ndim} axes"
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


def row(model: Model) -> str:
    """A row of the table."""
    found = analyse(model, GRID)
    replaced = [s for s in found.sites if s.replaced]
    graphs = str(found.graphs)
    if model.flags:
        graphs += " with " + ", ".join(f"`{flag}`" for flag in model.flags)
    origin = ", ".join(dict.fromkeys(s.grid_source for s in replaced))
    left = Counter((s.role, s.reason.split("; ")[0]) for s in found.sites if not s.replaced)
    dense = "<br>".join(f"{n} {role}: {reason}" for (role, reason), n in left.items())
    timestep = f"{found.timestep or 'in no graph'}; {found.convention or 'open'}"
    name = model.key.replace("/", ", ")
    return f"| {name} | {graphs} | {len(replaced)} | {origin} | {timestep} | {dense} |\n"


def page() -> str:
    """The whole page."""
    rows = "".join(row(model) for model in MODELS)
    others = "".join(f"- {name}: {reason}\n" for name, reason in ELSEWHERE.items())
    grid = " x ".join(map(str, GRID))
    header = HEADER.format(version=diffusers.__version__, grid=grid)
    return f"{header}{rows}\nNot analysed here:\n\n{others}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the page that is there")
    check = parser.parse_args().check
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    text = page()
    if check:
        if text != PAGE.read_text(encoding="utf-8"):
            print(f"{PAGE} is not up to date: run python bench/families.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
