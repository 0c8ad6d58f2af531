"""The studies of the papers, and their published numbers.

VFD-Adv: Cao et al. 2022, arXiv 2206.02158; AR-AT: Waseda et al. 2025, arXiv 2402.14648. Rows are named by their method,
with our defaults: TRADES' beta 6, MART's 5, HAT's 2.5 and .5, ALP's 1, VFD's weight .02 on the last stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from advalign import models
from advalign.studies.cells import Cell, Column
from advalign.studies.figures import feature_section, sweep_section, trade_off_section
from advalign.studies.scales import Scale
from advalign.studies.study import FigureBuilder, Study
from advalign.training.recipes import Recipe

TABLE_BASES = ("alp", "trades", "mart", "hat")
TABLE_PLUGINS = ("", "+kd", "+bgat", "+lbgat", "+vfd")
# The main question comes first: does VFD improve TRADES?
FIRST = ("natural", "trades", "trades+vfd")

_HEADINGS = ("black-box PGD", "black-box FGSM", "black-box C&W", "PGD", "FGSM", "C&W", "clean")
_TABLE1 = """
    natural       8.2 41.1 90.5   0.0 22.0  0.0  94.4
    alp          83.1 82.5 81.4  51.8 55.9 29.7  83.7
    alp+kd       82.9 83.0 84.8  51.9 58.4 33.1  84.0
    alp+bgat     83.5 82.5 84.3  52.2 57.3 30.8  84.1
    alp+lbgat    83.3 82.7 83.4  52.1 59.6 31.4  84.5
    alp+vfd      86.1 86.0 87.8  52.6 61.3 33.1  88.3
    trades       79.9 79.5 80.1  53.5 56.7 53.2  81.1
    trades+kd    81.1 79.6 80.3  52.8 56.8 50.1  82.1
    trades+bgat  80.4 81.6 81.3  53.7 57.2 51.3  82.9
    trades+lbgat 81.2 81.7 82.1  54.1 57.6 52.7  83.1
    trades+vfd   86.3 85.4 86.8  54.7 59.8 55.5  87.5
    mart         81.0 80.8 82.3  55.4 59.5 46.3  82.3
    mart+kd      79.9 79.3 81.0  54.9 58.4 45.7  81.1
    mart+bgat    81.0 80.5 82.1  54.4 58.7 43.4  82.1
    mart+lbgat   80.9 80.4 82.0  55.2 59.2 45.7  82.0
    mart+vfd     88.4 86.8 87.9  54.6 61.6 47.1  88.7
    hat          82.5 81.9 83.8  49.8 55.4 44.9  83.9
    hat+kd       84.5 84.1 85.8  50.1 56.8 43.1  84.9
    hat+bgat     83.2 82.7 84.2  50.4 56.9 43.8  84.2
    hat+lbgat    84.0 83.2 84.8  50.0 56.1 45.2  84.9
    hat+vfd      86.5 85.8 87.6  52.2 59.5 46.5  88.3
"""
_TABLE2 = """
    natural      17.4 18.9 69.9   0.0  7.3  0.0  75.2
    alp          50.5 51.6 51.2  30.0 31.7 23.2  51.4
    alp+kd       55.0 54.9 54.5  30.4 29.8 20.1  56.0
    alp+bgat     52.1 49.5 50.2  30.4 33.9 21.1  56.3
    alp+lbgat    59.3 58.5 58.1  30.5 31.1 22.0  59.4
    alp+vfd      62.3 61.6 62.9  31.8 33.0 23.2  63.2
    trades       55.0 54.4 55.9  25.4 28.0 24.5  56.0
    trades+kd    56.2 55.5 57.4  29.3 31.7 27.3  57.4
    trades+bgat  59.6 59.0 61.1  29.6 32.8 27.5  61.2
    trades+lbgat 54.7 55.9 57.6  28.9 32.5 26.3  57.6
    trades+vfd   64.8 63.1 67.2  30.1 34.1 27.7  67.3
    mart         53.9 53.1 54.8  32.2 34.0 28.2  54.9
    mart+kd      46.7 46.4 47.6  30.3 31.3 30.4  56.6
    mart+bgat    57.3 56.3 58.5  29.8 32.7 29.9  58.6
    mart+lbgat   56.1 55.5 57.2  32.4 33.5 30.3  57.2
    mart+vfd     62.1 62.9 62.4  32.5 35.4 30.4  63.8
    hat          57.5 56.8 59.0  26.5 29.5 20.2  59.0
    hat+kd       58.2 57.6 59.2  25.3 29.0 19.0  59.2
    hat+bgat     60.4 59.5 61.8  27.2 30.8 19.1  61.8
    hat+lbgat    60.1 59.4 60.1  27.7 30.0 18.7  61.2
    hat+vfd      62.7 62.4 63.1  28.0 32.8 20.1  64.5
"""
_Points = Sequence[tuple[str, str, float | str]]  # curve, method, position on the curve
_ARAT_HEADINGS = ("CIFAR-10 clean", "CIFAR-10 AA", "CIFAR-100 clean", "CIFAR-100 AA")
_ARAT = """
    at                    83.77 42.42 55.82 19.50
    trades                81.25 48.54 54.74 23.60
    mart                  82.15 47.83 54.54 26.04
    trades(beta=0)+lbgat  85.00 48.85 65.87 23.19
    ARREST                86.63 46.14
    at+ar-at              87.82 49.02 67.51 23.38
    at+ar-at, SWA         86.44 50.28 67.17 24.36
    at, large                        86.06 46.26 59.83 23.94
    trades, large                    84.33 51.75 57.61 26.88
    mart, large                      86.10 49.11 57.75 24.89
    trades(beta=0)+lbgat, large      88.19 52.56 68.17 26.92
    ARREST, large                    90.24 50.20 73.05 24.32
    at+ar-at(weight=100), large      90.89 50.77 72.51 24.18
    at+ar-at(weight=100), SWA, large 90.06 54.03 72.37 27.31
"""


def _published(table: str, headings: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Read lines of a row's name and its numbers; the last numbers may be missing."""
    lines = [re.fullmatch(r" *(.*?)  *([\d. ]+)", line) for line in table.splitlines() if line]
    return {
        line[1]: dict(zip(headings, map(float, line[2].split()), strict=False)) for line in lines if line is not None
    }


def _recipe(scale: Scale, method: str) -> Recipe:
    """Return the scale's recipe; LBGAT and AR-AT need an epoch of warm-up if the learning rate starts at its peak."""
    needs_warmup = scale.recipe.schedule == "piecewise" and any(name in method for name in ("lbgat", "ar-at"))
    return replace(scale.recipe, warmup=1) if needs_warmup else scale.recipe


def _table(
    scale: Scale, *, name: str, title: str, data: str, model: str, published: str = "", source: str = ""
) -> Study:
    parts = [("natural", ""), *((base, plugin) for base in TABLE_BASES for plugin in TABLE_PLUGINS)]
    cells = [
        Cell(
            method=base + plugin, data=data, model=model, recipe=_recipe(scale, base + plugin), at=plugin,
            curve=base if base in TABLE_BASES else "",  # natural lies so far off that all others would coincide
        )
        for base, plugin in parts
    ]  # fmt: skip
    return Study(
        name=name,
        title=f"{title}, scale {scale.name}",
        cells=tuple(cells),
        columns=scale.columns(),
        seeds=scale.seeds,
        surrogate=scale.surrogate(data),
        first=FIRST,
        published=_published(published, _HEADINGS),
        source=source,
        figures=(trade_off_section,),
    )


def table1(scale: Scale) -> Study:
    """Four bases, each plain and with KD, BGAT, LBGAT and VFD, on CIFAR-10."""
    return _table(
        scale, name="table1", title="VFD-Adv's Table 1, CIFAR-10", data="cifar10", model=scale.model,
        published=_TABLE1, source="Cao et al. 2022, Table 1, ResNet-18 on all training images",
    )  # fmt: skip


def table2(scale: Scale) -> Study:
    """The same on CIFAR-100."""
    return _table(
        scale, name="table2", title="VFD-Adv's Table 2, CIFAR-100", data="cifar100", model=scale.model,
        published=_TABLE2, source="Cao et al. 2022, Table 2, ResNet-18 on all training images",
    )  # fmt: skip


def vgg16(scale: Scale) -> Study:
    """Table 1 with VGG16, as in the supplement, whose numbers were not available to us."""
    return _table(scale, name="vgg16", title="Table 1 with VGG16, CIFAR-10", data="cifar10", model=scale.vgg)


def figure2(scale: Scale) -> Study:
    """TRADES with beta 1 to 6, plain and with each plug-in: the trade-off as curves."""
    points = [
        (f"trades{plugin}", f"trades(beta={beta}){plugin}", float(beta))
        for plugin in TABLE_PLUGINS
        for beta in range(1, 7)
    ]
    title = "VFD-Adv's Figure 2: TRADES' beta from 1 to 6"
    study = _sweep(scale, "figure2", title, points, sweep_section("beta"))
    return replace(study, first=tuple(c.row for c in study.cells if c.curve in FIRST), figures=(trade_off_section,))


def figure3(scale: Scale) -> Study:
    """t-SNE of clean and adversarial features, of five classes with 500 images each."""
    rows = ("natural", "trades", "trades+lbgat", "trades+vfd")
    points = [(row, row, "") for row in rows]
    return _sweep(scale, "figure3", "VFD-Adv's Figure 3: features", points, feature_section)


def figure4a(scale: Scale) -> Study:
    """VFD on TRADES at each stage of the network, and at the logits."""
    *earlier, last = models.layers(models.build(scale.model, classes=10))[:-2]
    points = [("trades+vfd", f'trades+vfd(layer="{layer}")', layer) for layer in (*earlier, "logits")]
    points.insert(len(earlier), ("trades+vfd", "trades+vfd", last))  # its default layer
    return _sweep(scale, "figure4a", "VFD-Adv's Figure 4a: the layer", points, sweep_section("layer"))


def figure4b(scale: Scale) -> Study:
    """VFD's weight on TRADES, from 0, which is TRADES, to 0.04."""
    weights = [round(0.005 * k, 3) for k in range(9)]
    points = [("trades+vfd", f"trades+vfd(weight={w})" if w else "trades", w) for w in weights]
    return _sweep(scale, "figure4b", "VFD-Adv's Figure 4b: the weight", points, sweep_section("weight"))


def arat(scale: Scale) -> Study:
    """AR-AT's Table 3: clean and AutoAttack accuracy on CIFAR-10 and CIFAR-100, with two networks."""
    # Equal weights from the learning rate's first drop on, as in the authors' schedule; without drops, their share.
    start = scale.recipe.milestones[0] if scale.recipe.schedule == "piecewise" else 0.76
    cells = []
    for model, weight, suffix in ((scale.model, "", ""), (scale.large, "(weight=100)", ", large")):
        ours = f"at+ar-at{weight}"
        rows = [
            (method, "", _recipe(scale, method)) for method in ("at", "trades", "mart", "trades(beta=0)+lbgat", ours)
        ]
        averaged = replace(_recipe(scale, ours), average="swa", average_start=start)
        for method, swa, recipe in (*rows, (ours, ", SWA", averaged)):
            row = f"{method}{swa}{suffix}"
            cells += [Cell(row=row, method=method, data=d, model=model, recipe=recipe) for d in ("cifar10", "cifar100")]
    n = scale.autoattack
    return Study(
        name="arat",
        title=f"AR-AT's Table 3, scale {scale.name}",
        cells=tuple(cells),
        columns=(
            Column(heading="CIFAR-10 clean", data="cifar10"),
            Column(heading="CIFAR-10 AA", attack="autoattack", n=n, data="cifar10"),
            Column(heading="CIFAR-100 clean", data="cifar100"),
            Column(heading="CIFAR-100 AA", attack="autoattack", n=n, data="cifar100"),
        ),
        seeds=scale.seeds,
        published=_published(_ARAT, _ARAT_HEADINGS),
        source="Waseda et al. 2025, Table 3: ResNet-18, and WRN-34-10 where it says large; last epoch, five seeds",
    )


def afa(scale: Scale) -> Study:
    """AFA as we rebuilt it, alone and joined to TRADES; its authors' tables were not available to us."""
    rows = ("natural", "at", "afa", "afa(adversarial=true)", "trades")
    points = [("" if row == "natural" else row, row, "") for row in rows]  # natural lies far off, as in Table 1
    points += [("trades+afa", f"trades+afa(weight={weight})", weight) for weight in (0.1, 0.5, 1.0)]
    return _sweep(scale, "afa", "AFA, alone and on TRADES, CIFAR-10", points, trade_off_section)


def _sweep(scale: Scale, name: str, title: str, points: _Points, *figures: FigureBuilder) -> Study:
    """Return a study of methods along curves."""
    columns = {column.heading: column for column in scale.columns()}
    return Study(
        name=name,
        title=f"{title}, scale {scale.name}",
        cells=tuple(
            Cell(
                method=method,
                data="cifar10",
                model=scale.model,
                recipe=_recipe(scale, method),
                curve=curve,
                at=at,
            )
            for curve, method, at in points
        ),
        columns=tuple(columns[heading] for heading in ("clean", "FGSM", "PGD", "AA")),
        seeds=scale.seeds,
        figures=figures,
    )
