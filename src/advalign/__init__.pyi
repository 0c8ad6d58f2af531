from . import attacks, data, models
from .attacks import Attack
from .errors import TrainingError, UserError
from .evaluation.accuracy import evaluate
from .evaluation.diagnose import diagnose
from .frontier.frontier import frontier
from .objectives import Base, Method, Objective, PlugIn, compose, parse, total
from .objectives.bases.adaad import AdaAD
from .objectives.bases.adaiad import AdaIAD
from .objectives.bases.afa import LinearAFA
from .objectives.bases.alp import ALP
from .objectives.bases.ard import ARD
from .objectives.bases.at import AT
from .objectives.bases.contrast import Contrast
from .objectives.bases.dkl import DKL
from .objectives.bases.hat import HAT
from .objectives.bases.iad import IAD
from .objectives.bases.iad2 import IAD2
from .objectives.bases.ikl import IKL
from .objectives.bases.mart import MART
from .objectives.bases.mixaware import MixAware
from .objectives.bases.mtard import MTARD
from .objectives.bases.natural import Natural
from .objectives.bases.rslad import RSLAD
from .objectives.bases.score import SCORE
from .objectives.bases.trades import TRADES
from .objectives.plugins.adaad import AdaADAttack
from .objectives.plugins.adr import ADR
from .objectives.plugins.afa import AFA
from .objectives.plugins.ar_at import ARAT
from .objectives.plugins.bgat import BGAT
from .objectives.plugins.consistency import Consistency
from .objectives.plugins.dajat import DAJAT
from .objectives.plugins.generalist import Generalist
from .objectives.plugins.igdm import IGDM
from .objectives.plugins.kd import KD
from .objectives.plugins.lbgat import LBGAT
from .objectives.plugins.part import PART
from .objectives.plugins.pgi import PGI
from .objectives.plugins.qub import QUB
from .objectives.plugins.rebat import ReBAT
from .objectives.plugins.rpat import RPAT
from .objectives.plugins.sglr import SGLR
from .objectives.plugins.vfd import VFD
from .runs import load
from .threats import L1, L2, Linf
from .training.recipes import Recipe
from .training.train import train

__all__ = [
    "ADR",
    "AFA",
    "ALP",
    "ARAT",
    "ARD",
    "AT",
    "BGAT",
    "DAJAT",
    "DKL",
    "HAT",
    "IAD",
    "IAD2",
    "IGDM",
    "IKL",
    "KD",
    "L1",
    "L2",
    "LBGAT",
    "MART",
    "MTARD",
    "PART",
    "PGI",
    "QUB",
    "RPAT",
    "RSLAD",
    "SCORE",
    "SGLR",
    "TRADES",
    "VFD",
    "AdaAD",
    "AdaADAttack",
    "AdaIAD",
    "Attack",
    "Base",
    "Consistency",
    "Contrast",
    "Generalist",
    "LinearAFA",
    "Linf",
    "Method",
    "MixAware",
    "Natural",
    "Objective",
    "PlugIn",
    "ReBAT",
    "Recipe",
    "TrainingError",
    "UserError",
    "attacks",
    "compose",
    "data",
    "diagnose",
    "evaluate",
    "frontier",
    "load",
    "models",
    "parse",
    "total",
    "train",
]
