"""Reports: one self-contained HTML page per group, and an index over the groups of a run."""

from panotriton.groups.report.index import write_index
from panotriton.groups.report.page import write_report

__all__ = ["write_index", "write_report"]
