"""Studies: declared sets of runs and evaluations, run here or on a cluster, whose table shows any state."""

from advalign.studies.cells import Cell, Column
from advalign.studies.context import ExecutionContext
from advalign.studies.figures import sweep_section, trade_off_section
from advalign.studies.progress import Progress
from advalign.studies.registry import STUDIES, find_study
from advalign.studies.results import Results
from advalign.studies.run import check_executor, plan_study, run_study
from advalign.studies.scales import SCALES, Scale
from advalign.studies.study import Study

__all__ = [
    "SCALES",
    "STUDIES",
    "Cell",
    "Column",
    "ExecutionContext",
    "Progress",
    "Results",
    "Scale",
    "Study",
    "check_executor",
    "find_study",
    "plan_study",
    "run_study",
    "sweep_section",
    "trade_off_section",
]
