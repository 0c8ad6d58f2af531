"""The shapes that signatures state: N images of C channels and H x W pixels, K classes. Only tests check them."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

ImageBatch = Float[Tensor, "N C H W"]
Attacked = Float[Tensor, "M C H W"]
"""Adversarial images: N, or N for each augmentation that is attacked."""
Further = Float[Tensor, "S C H W"]
"""Further augmentations of N images: N of each, one behind the other."""
Labels = Int[Tensor, "N"]
Rows = Int[Tensor, "N"]
"""The numbers of images in the training set."""
Logits = Float[Tensor, "N K"]
Features = Float[Tensor, "N *features"]
"""What a layer gives for each image, of any shape."""
PerImage = Float[Tensor, "N"]
Mask = Bool[Tensor, "N"]
