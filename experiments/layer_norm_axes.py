"""Layer Norm over (C, H, W) or per pixel: which of the two names does a convnet want?

Question: "Layer Norm" is GroupNorm(1, C) in Wu & He (2018), one mean for all channels and pixels of
an image, and per pixel over the channels in ConvNeXt (Liu et al. 2022). Does it matter which?
Varies: the axes that share a mean: (C, H, W), or C alone at each pixel. Both have 2C parameters.
Held: the course's recipe for Layer Norm, 20 epochs of all 50,000 training images, batches of 128,
bf16; the first weights and the order of images. The rate was searched for (C, H, W), so per pixel
has, if anything, a disadvantage.
Judged on the 10,000 test images after the last epoch; nothing is chosen by them.
Control: on maps of 1 x 1 pixel the two are the same function (a test).
Seeds 0, 1, 2. Cost: three trainings of about an hour on one core; over (C, H, W) the runs are those
of the main table (main_table.py), on the same processor.
The papers found: Wu & He, ResNet-50, ImageNet, error (%): Layer Norm over (C, H, W) 25.3, Batch
Norm 23.6. Liu et al. replaced Batch Norm by Layer Norm per pixel in ConvNeXt-T: 81.4 to 81.5 %.
LayerNorm([C, H, W]), with a scale and a shift for each entry, does not fit into the 50,000
parameters and is not trained.
"""

from collections.abc import Iterator

from common import Training, final_accuracy
from torch import Tensor, nn

from normcourse.data import Data, load_data
from normcourse.norm import exchange_norms
from normcourse.train import default_settings

SEEDS = (0, 1, 2)


class PixelLayerNorm(nn.LayerNorm):
    """Layer Norm over the channels of each pixel; one scale and one shift per channel."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        pixels = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        return super().forward(pixels).permute(0, 3, 1, 2)


def trials() -> Iterator[Training]:
    for seed in SEEDS:
        settings = default_settings(norm="ln", seed=seed)
        yield Training("per pixel", settings, per_pixel, at_end=final_accuracy)


def per_pixel(model: nn.Module) -> None:
    """Exchange the network's norms, in place."""
    exchange_norms(model, lambda _, norm: PixelLayerNorm(norm.num_channels))


def load(source: str | None) -> Data:
    return load_data(source)
