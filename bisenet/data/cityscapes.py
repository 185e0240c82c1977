"""Cityscapes (Cordts et al., CVPR 2016): the official tree of fine and coarse annotations."""

from pathlib import Path

from bisenet.data.samples import IncompleteSplit, Sample

HELP = """expected the official tree
  leftImg8bit/{split}/<city>/<name>_leftImg8bit.png
  {labels}/{split}/<city>/<name>_{labels}_labelIds.png (or _labelTrainIds.png; those of test are not public)
Register at https://www.cityscapes-dataset.com, download {zips},
unpack all into one folder and pass it as data.root."""

# What the official zips hold at their top; many unpackers put a folder named after the zip around it.
_FINE = ("leftImg8bit_trainvaltest", "gtFine_trainvaltest", "gtFine")
_COARSE = ("leftImg8bit_trainextra", "gtCoarse", "gtCoarse")

_CORRUPT = "troisdorf_000000_000073"  # of train_extra: black all over, as the download page warns


def list_cityscapes(root: Path, split: str) -> list[Sample]:
    """All pictures of a split, ordered by city and name; without labels where the split has none.

    ``train_extra`` has coarse labels (``gtCoarse``), all others have fine ones. ``labelIds`` files are preferred;
    ``labelTrainIds`` (what the official preparation script writes) are read where they are all there is. The one
    picture of ``train_extra`` that is corrupt is left out.

    Raises:
        FileNotFoundError: no such split, or (IncompleteSplit) one where some pictures have no label.
        ValueError: the split is empty.
    """
    image_zip, label_zip, kind = _COARSE if split == "train_extra" else _FINE
    images, labels = _folder(root, image_zip, "leftImg8bit", split), _folder(root, label_zip, kind, split)
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is not a folder; {help_text(split)}")
    present = set(labels.glob(f"*/*_{kind}_label*Ids.png"))
    samples: list[Sample] = []
    missing: list[str] = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = image.name.removesuffix("_leftImg8bit.png")
        stem = labels / image.parent.name / f"{name}_{kind}"
        ids, train_ids = (stem.with_name(f"{stem.name}_label{which}.png") for which in ("Ids", "TrainIds"))
        if name == _CORRUPT:
            continue
        if not present:
            samples.append(Sample(image, None))
        elif not {ids, train_ids} & present:
            missing.append(f"image without label: {image} has neither {ids} nor {train_ids.name}")
        else:
            samples.append(Sample(image, ids) if ids in present else Sample(image, train_ids, train_ids=True))
    if missing:
        raise IncompleteSplit(missing, samples, len(samples) + len(missing))
    if not samples:
        raise ValueError(f"split {split!r} is empty: no <city>/<name>_leftImg8bit.png in {images}")
    return samples


def help_text(split: str) -> str:
    """Where the files of a split come from and where they are looked for."""
    image_zip, label_zip, kind = _COARSE if split == "train_extra" else _FINE
    return HELP.format(split=split, labels=kind, zips=f"{image_zip}.zip and {label_zip}.zip")


def _folder(root: Path, zipped: str, kind: str, split: str) -> Path:
    """``kind/split`` below ``root``, or below a folder that is named after its zip."""
    plain, wrapped = root / kind / split, root / zipped / kind / split
    return wrapped if wrapped.is_dir() and not plain.is_dir() else plain
