"""The commands that plan a training: one for each recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastskel.bench.plan import Workload
    from fastskel.recipes import USDRLRecipe

__all__ = ["plan_commands"]

Command = Callable[..., None]


def plan_commands() -> dict[str, Command]:
    """Return the command that plans each recipe."""
    from fastskel.recipes import RECIPES

    return {name: _plan_command(name, RECIPES[name]) for name in RECIPES}


def _plan_command(name: str, make_recipe: Callable[[], USDRLRecipe]) -> Command:
    from fastskel.bench.plan import Workload

    defaults, one_gpu = make_recipe(), Workload()

    def plan(
        batch: int | None = None,
        machine: str = "h200",
        json: Path | None = None,
        workload: Workload = one_gpu,
        recipe: USDRLRecipe = defaults,
    ) -> None:
        import json as plain

        from fastskel.atomic import atomic_write
        from fastskel.bench.plan import plan as make_plan
        from fastskel.bench.plan import read_machine

        wanted = recipe if batch is None else replace(recipe, batch_size=batch)
        made = make_plan(name, wanted, read_machine(machine), workload)
        print(made.table())
        if json is not None:
            with atomic_write(json) as scratch:
                scratch.write_text(plain.dumps(made.as_json(), indent=1) + "\n", encoding="utf-8")

    # tyro reads the settings off these annotations
    plan.__annotations__ |= {"recipe": type(defaults), "workload": Workload, "batch": int | None, "json": Path | None}
    plan.__doc__ = f"""Memory, time and traffic of: {(make_recipe.__doc__ or name).splitlines()[0]}

    Nothing is trained. Every figure says whether it is counted, measured, from a data sheet, assumed, or predicted from these.

    Args:
        batch: Clips per step of all processes together, in short for batch_size.
        machine: h200, h100 or a100; this, which measures the machine it runs on; or a file of fastskel.bench.machine --json.
        json: Write all figures to this file too.
        workload: Processes and data.
        recipe: Settings of the recipe {name}.
    """
    return plan
