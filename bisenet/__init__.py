"""BiSeNet real-time semantic segmentation: train, evaluate, compare and ship, configured by Hydra, run by Lightning."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from bisenet.config import DataConfig
    from bisenet.inference import Segmenter

__all__ = ["load"]


def load(path: "str | PathLike[str]", data: "str | DataConfig | None" = None) -> "Segmenter":
    """Load a trained model from a checkpoint file or a run directory, with nothing else needed.

    >>> model = bisenet.load("outputs/demo/2026-01-01_12-00-00")
    >>> train_ids = model.predict(rgb_uint8_array)  # (H, W, 3) -> (H, W)

    Published weights of the reference know no classes; ``data`` names the data set (an option of ``conf/data``):

    >>> model = bisenet.load("model_final_v2_city.pth", data="cityscapes")
    """
    from bisenet import experiment  # torch is imported only when it is needed

    return experiment.load(path, data)
