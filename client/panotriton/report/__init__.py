"""Reports: one self-contained HTML page a group, and an index over the groups of a run."""

from panotriton.report.index import write_index
from panotriton.report.page import write_report

__all__ = ["write_index", "write_report"]
