"""The studies by name, and a study by any spelling: a name, a file, or a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from advalign.errors import unknown
from advalign.studies import paper
from advalign.studies.declared import read_python, read_yaml, study_of_function
from advalign.studies.demo import demo_study
from advalign.studies.methods import methods_study
from advalign.studies.scales import Scale
from advalign.studies.study import Study

STUDIES: dict[str, Callable[[Scale], Study]] = {
    "table1": paper.table1,
    "table2": paper.table2,
    "figure2": paper.figure2,
    "figure3": paper.figure3,
    "figure4a": paper.figure4a,
    "figure4b": paper.figure4b,
    "vgg16": paper.vgg16,
    "arat": paper.arat,
    "afa": paper.afa,
    "methods": methods_study,
    "demo": demo_study,
}


def find_study(spelling: str, scale: Scale, trust_model: bool = False) -> Study:
    """Return the study of a name, of a `.yaml` file, of the function `study` in a `.py` file, or of `module:function`.

    A function is called with the scale, whose recipe, networks and columns it may use. It is a program of the user's;
    a YAML file is data, and a function that it names as a network is called only with `trust_model`.

    Raises:
        UserError: there is no such study, or it is not well-formed.
    """
    if spelling in STUDIES:
        return STUDIES[spelling](scale)
    path = Path(spelling)
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path, scale, trust_model)
    if path.suffix == ".py":
        return read_python(path, scale)
    if ":" in spelling:
        return study_of_function(spelling, scale)
    raise unknown("study", spelling, STUDIES)
