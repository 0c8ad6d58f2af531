"""Studies: declared sets of runs and evaluations, carried out here or on a cluster, at any state a table."""

from advalign.studies.declared import find_study
from advalign.studies.execute import Place
from advalign.studies.paper import STUDIES
from advalign.studies.results import Results, sweep, trade_off
from advalign.studies.run import check_executor, conduct, laid_out
from advalign.studies.scales import SCALES, Scale
from advalign.studies.study import Cell, Column, Study

__all__ = [
    "SCALES",
    "STUDIES",
    "Cell",
    "Column",
    "Place",
    "Results",
    "Scale",
    "Study",
    "check_executor",
    "conduct",
    "find_study",
    "laid_out",
    "sweep",
    "trade_off",
]
