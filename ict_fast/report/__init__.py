"""What a run was, did and reached, as one page that needs nothing but a browser."""

from ict_fast.report.page import page
from ict_fast.report.run_record import RunRecord, read_run

__all__ = ["RunRecord", "page", "read_run"]
