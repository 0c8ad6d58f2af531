"""Studies: declared sets of runs and evaluations, carried out here or on a cluster, at any state a table."""

from advalign.studies.context import ExecutionContext
from advalign.studies.declared import find_study
from advalign.studies.paper import STUDIES
from advalign.studies.results import Results, sweep, trade_off
from advalign.studies.run import check_executor, plan_study, run_study
from advalign.studies.scales import SCALES, Scale
from advalign.studies.study import Cell, Column, Study

__all__ = [
    "SCALES",
    "STUDIES",
    "Cell",
    "Column",
    "ExecutionContext",
    "Results",
    "Scale",
    "Study",
    "check_executor",
    "find_study",
    "plan_study",
    "run_study",
    "sweep",
    "trade_off",
]
