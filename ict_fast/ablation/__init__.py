"""The paper's findings as comparisons of short runs: one ingredient added or removed at a time."""

from ict_fast.ablation.findings import FINDINGS, Finding, judge, summarise
from ict_fast.ablation.runs import Plan, run_all
from ict_fast.ablation.variants import VARIANTS, Variant, configured

__all__ = [
    "FINDINGS",
    "VARIANTS",
    "Finding",
    "Plan",
    "Variant",
    "configured",
    "judge",
    "run_all",
    "summarise",
]
