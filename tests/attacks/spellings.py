"""Attacks as tests spell them: short ones, and those that draw nothing."""

from __future__ import annotations

QUICK = {  # the defaults of these take seconds
    "square": "square(queries=30)",
    "cw": "cw(c=30, steps=30, lr=0.1)",
    "ddn": "ddn(steps=20)",
    "fmn": "fmn(steps=20)",
    "autoattack": "worst(apgd-ce(steps=5), apgd-t(steps=5, targets=2), fab-t(steps=5, targets=2), square(queries=20))",
    "apgd-ce": "apgd-ce(steps=20)",
    "apgd-dlr": "apgd-dlr(steps=20)",
    "apgd-t": "apgd-t(steps=20)",
    "apgd-margin": "apgd-margin(steps=10, targets=2)",
    "fast": "worst(apgd-ce(steps=5), apgd-margin(steps=5, targets=2), apgd-margin(steps=5, targets=2, start=odi))",
    "min-margin": "min-margin(steps=10, targets=2)",
    "fab": "fab(steps=20)",
    "fab-t": "fab-t(steps=20)",
}
DETERMINISTIC = [
    "fgsm",
    "mim",
    QUICK["cw"],
    QUICK["fmn"],
    "cw(steps=30, abort=true)",
    "pgd(start=clean)",
    'pgd(start=clean, loss="margin", until_fooled=False)',
]
