"""Cityscapes (Cordts et al., CVPR 2016): the official tree of fine annotations."""

from pathlib import Path

from bisenet.data.samples import IncompleteSplit, Sample

HELP = """expected the official tree
  leftImg8bit/{split}/<city>/<name>_leftImg8bit.png
  gtFine/{split}/<city>/<name>_gtFine_labelIds.png (or _labelTrainIds.png)
Register at https://www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip,
unpack both into one folder and pass it as data.root."""


def list_cityscapes(root: Path, split: str) -> list[Sample]:
    """All pictures of a split, ordered by city and name.

    ``labelIds`` files are preferred; ``labelTrainIds`` (what the official preparation script writes) are read where
    they are all there is.

    Raises:
        FileNotFoundError: no such split, or (IncompleteSplit) images without label.
        ValueError: the split is empty.
    """
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is not a folder; {HELP.format(split=split)}")
    present = set(labels.glob("*/*_gtFine_label*Ids.png"))
    samples: list[Sample] = []
    missing: list[str] = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        stem = labels / image.parent.name / image.name.removesuffix("_leftImg8bit.png")
        ids, train_ids = (stem.with_name(f"{stem.name}_gtFine_label{kind}.png") for kind in ("Ids", "TrainIds"))
        if not {ids, train_ids} & present:
            missing.append(f"image without label: {image} has neither {ids} nor {train_ids.name}")
            continue
        samples.append(Sample(image, ids) if ids in present else Sample(image, train_ids, train_ids=True))
    if missing:
        raise IncompleteSplit(missing, samples)
    if not samples:
        raise ValueError(f"split {split!r} is empty: no <city>/<name>_leftImg8bit.png in {images}")
    return samples
