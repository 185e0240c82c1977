"""Data sets, training augmentation, and the LightningDataModule that serves them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bisenet.data.datamodule import SegmentationDataModule

__all__ = ["SegmentationDataModule"]


def __getattr__(name: str) -> Any:
    """Import the data module, and Lightning with it, only for those who ask."""
    if name in __all__:
        from bisenet.data.datamodule import SegmentationDataModule

        return SegmentationDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
