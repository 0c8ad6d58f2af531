"""The scales of studies: recipe, networks, and the number of test images for slow attacks.

The precision of training belongs to the scale and not to the device, since it is part of a run's name: the same command
on another machine resumes the same runs. `paper` has the papers' fp32; `short` is for one GPU and has bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from advalign.studies.cells import Cell, Column
from advalign.training.recipes import Recipe, common, cpu, short

_NOTE_ON_CW = (
    "C&W is the L2 attack with c = 1 fixed, κ = 0, 1000 steps, lr .01, as in the paper's settings: "
    "it is not confined to the threat model, and measures the scale of the logits as much as robustness"
)
_NOTE_ON_CW_INF = "CW-inf is PGD on the margin loss, 100 steps, inside the threat model"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The defaults of a study."""

    name: str
    description: str
    recipe: Recipe
    model: str
    vgg: str
    """the network in place of VGG16"""
    large: str
    """the network in place of WRN-34-10: the black-box surrogate, trained naturally, and AR-AT's larger network"""
    carlini_wagner: int
    """test images for the L2 attack of Carlini and Wagner, 1000 steps each"""
    autoattack: int | None
    """test images for AutoAttack; all if None"""
    seeds: int

    def columns(self) -> tuple[Column, ...]:
        """Return the columns of the paper's tables, AutoAttack, and the Linf attack that is also called C&W."""
        few = self.carlini_wagner
        return (
            Column(heading="black-box PGD", attack="pgd(steps=20)", black_box=True),
            Column(heading="black-box FGSM", attack="fgsm", black_box=True),
            Column(heading="black-box C&W", attack="cw", n=few, black_box=True, note=_NOTE_ON_CW),
            Column(heading="PGD", attack="pgd(steps=20)"),
            Column(heading="FGSM", attack="fgsm"),
            Column(heading="C&W", attack="cw", n=few, note=_NOTE_ON_CW),
            Column(heading="clean"),
            Column(heading="AA", attack="autoattack", n=self.autoattack),
            Column(heading="CW-inf", attack='pgd(loss="margin", steps=100)', note=_NOTE_ON_CW_INF),
        )

    def surrogate(self, data: str) -> Cell:
        """Return the model on which black-box attacks are made."""
        return Cell(row="surrogate", method="natural", data=data, model=self.large, recipe=self.recipe)


SCALES = {
    "paper": Scale(
        name="paper",
        description="resnet18, 110 epochs, all images, three seeds: the common recipe, days on one GPU",
        recipe=common(),
        model="resnet18",
        vgg="vgg16",
        large="wide-resnet-34-10",
        carlini_wagner=2000,
        autoattack=None,
        seeds=3,
    ),
    "short": Scale(
        name="short",
        description="the same networks and images, 30 epochs of one cycle in bf16: minutes a row on one GPU",
        recipe=replace(short(), precision="bf16"),
        model="resnet18",
        vgg="vgg16",
        large="wide-resnet-34-10",
        carlini_wagner=1000,
        autoattack=None,
        seeds=1,
    ),
    "tiny": Scale(
        name="tiny",
        description="a small network, 10,000 images, 12 epochs, for two CPU cores; AA and C&W on 250 test images",
        recipe=replace(cpu(), epochs=12, steps=5, validate_every=3),
        model="small-cnn(width=16)",
        vgg="vgg16(width=8)",
        large="small-cnn",
        carlini_wagner=250,
        autoattack=250,
        seeds=1,
    ),
}
