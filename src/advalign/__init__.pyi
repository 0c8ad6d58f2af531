from . import attacks, data, models
from .errors import TrainingError, UserError
from .evaluation import evaluate
from .objectives import Base, Method, Objective, PlugIn, compose, parse, total
from .objectives.bases.alp import ALP
from .objectives.bases.at import AT
from .objectives.bases.hat import HAT
from .objectives.bases.mart import MART
from .objectives.bases.natural import Natural
from .objectives.bases.trades import TRADES
from .objectives.plugins.bgat import BGAT
from .objectives.plugins.kd import KD
from .objectives.plugins.lbgat import LBGAT
from .objectives.plugins.vfd import VFD
from .recipes import Recipe
from .runs import load
from .threats import L2, Linf
from .training import train

__all__ = [
    "ALP",
    "AT",
    "BGAT",
    "HAT",
    "KD",
    "L2",
    "LBGAT",
    "MART",
    "TRADES",
    "VFD",
    "Base",
    "Linf",
    "Method",
    "Natural",
    "Objective",
    "PlugIn",
    "Recipe",
    "TrainingError",
    "UserError",
    "attacks",
    "compose",
    "data",
    "evaluate",
    "load",
    "models",
    "parse",
    "total",
    "train",
]
