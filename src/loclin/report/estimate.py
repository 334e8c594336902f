"""What is said of the cost of analyses that are planned."""

from __future__ import annotations

from rich.text import Text

from loclin.analyses.estimate import Estimate
from loclin.report.sheet import PAGE, Block, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table
from loclin.report.text import plain


@describe.register
def _describe_estimate(found: Estimate, _limits: Limits = PAGE) -> Sheet:
    heads = ("trace", "sweeps", "result", "peak", "read", "flops", "time")
    table = Table.of(Column("analysis", "key"), *heads, Column("fits", "parts"))
    advice: list[Block] = []
    for one in found.analyses:
        sizes = [size(n) for n in (one.trace, one.sweeps, one.result, one.peak, one.read)]
        fits = Text("yes", "green") if one.fits else Text("no", "bold red")
        table.add(Text(one.name, "bold"), *sizes, scaled(one.flops), duration(one.seconds), fits)
        if one.advice:
            advice.append(Text.assemble((one.name, "bold"), f": {plain(one.advice)}"))
    layers = ", its layers on disk" if found.stream else ""
    facts = (
        f"{found.n_parameters / 1e9:.2f} billion parameters in {found.dtype}: {size(found.stored)}{layers}; "
        f"{size(found.weights)} in memory; {found.tokens} tokens"
    )
    rates = found.rates
    machine = (
        f"a machine with {size(found.available)}, {size(found.budget)} of it beside weights and results; "
        f"{scaled(rates.flops)}flop/s, "
        f"{size(rates.memory)}/s from memory, {size(rates.read)}/s from disk"
    )
    blocks: list[Block] = [Text(facts), Text(machine), Text(), table, *([Text()] if advice else []), *advice]
    section = Section(f"{plain(found.model)} ({found.family})", "linearize before them included", blocks)
    return Sheet("plan", "what analyses will cost", [section], notes=found.warnings)


def size(nbytes: int | float) -> str:
    """Bytes, in the unit that suits them."""
    return f"{scaled(nbytes)}B" if nbytes else "–"


def scaled(value: int | float) -> str:
    """A number with three digits and a unit prefix."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: int | float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
