"""Data sets, training augmentation, and the LightningDataModule that serves them; each is imported when asked for."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bisenet.data.datamodule import SegmentationDataModule
    from bisenet.data.datasets import CamVid, Cityscapes, Listed, Synthetic
    from bisenet.data.transforms import ColorJitter, ScaleCrop

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else importing albumentations asks the network for a newer version

__all__ = ["CamVid", "Cityscapes", "ColorJitter", "Listed", "ScaleCrop", "SegmentationDataModule", "Synthetic"]
_FILES = {"SegmentationDataModule": "datamodule", "ColorJitter": "transforms", "ScaleCrop": "transforms"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"bisenet.data.{_FILES.get(name, 'datasets')}"), name)
