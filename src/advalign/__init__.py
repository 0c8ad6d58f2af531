"""Adversarial training that keeps the accuracy: any base method with any alignment plug-in.

An objective is a base plus plug-ins, `TRADES(beta=6) + VFD(weight=0.02)`; an attack climbs a loss inside a threat
model; a run is a folder. Images are (N, C, H, W) in [0, 1] everywhere. The names are listed in `__init__.pyi` and
imported on first use, so that `advalign --help` need not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
