"""What a run will take: memory, bytes, hours. The model behind it is in docs/planning.md."""

from ict_fast.planning.plan import Plan, make_plan
from ict_fast.planning.tables import tables

__all__ = ["Plan", "make_plan", "tables"]
