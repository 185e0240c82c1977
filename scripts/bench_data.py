"""Training samples: from files, from the decoded cache, and the reference's; what building the cache costs.

    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench_data.py                     # synthetic scenes of 1024x2048
    REFERENCE_ROOT=... python scripts/bench_data.py --root /data/cityscapes          # the data set itself
    REFERENCE_ROOT=... python scripts/bench_data.py --photos /data/camvid/images     # photographs, enlarged

The recipe is Cityscapes' of BiSeNetV2, crops of 512x1024, in one process; then through data loaders of several workers.
A sample's time is that of its processor, which other work on the machine hardly changes; building and loaders, which
wait for disks and for each other, are timed by the clock.
PNGs of photographs are larger and slower to decode than those of synthetic scenes: the size of the files stands in the
results. The reference normalises its images in the sample, ours are normalised on the device.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import bench

SIZE = (1024, 2048)


def main() -> None:
    """Measure all in turn, then loaders with more and more workers."""
    options = bench.parser(__doc__)
    source = options.add_mutually_exclusive_group()
    source.add_argument("--root", type=Path, help="Cityscapes")
    source.add_argument("--photos", type=Path, help="folder of images, which take the place of the synthetic ones")
    options.add_argument("--images", type=int, default=16, help="how many are read in a round")
    options.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of the loaders that are measured")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_data_") as folder:
        root = given.root or scenes(Path(folder) / "scenes", given.images, given.photos)
        measure(given, root, Path(folder))


def measure(given: Any, root: Path, folder: Path) -> None:
    """Print and write the rows of one data set."""
    import cv2
    import torch

    from bisenet.data.cache import DecodedCache
    from bisenet.data.datasets import read_sample

    torch.set_num_threads(given.threads)
    cv2.setNumThreads(given.threads)
    from_files, from_cache = (module(root, folder, given.images, cache) for cache in (None, "memmap"))
    samples, cache = from_cache.samples("train"), from_cache._cache
    assert isinstance(cache, DecodedCache)
    draws = {"files": draw(from_files), "cache": draw(from_cache), "first": draw(from_cache)}

    def forget_and_draw() -> None:
        cache._checked.clear()
        draws["first"](given.images)

    def build() -> None:
        shutil.rmtree(folder / "built", ignore_errors=True)
        DecodedCache(folder / "built", cache._of, cache._read).add(samples)

    contenders: dict[str, Callable[[], Any]] = {
        "decoding": lambda: [read_sample(sample, from_files.table) for sample in samples],
        "building": build,
        "files": lambda: draws["files"](given.images),
        "cache": lambda: draws["cache"](given.images),
        "first": forget_and_draw,
    }
    if bench.has_reference():
        drawn = theirs(samples, folder)
        contenders["reference"] = lambda: list(islice(drawn, given.images))
    busy: dict[str, list[float]] = {name: [] for name in contenders}

    def timed(name: str) -> None:
        started = time.process_time()
        contenders[name]()
        busy[name].append(time.process_time() - started)

    seconds = bench.in_turn({name: partial(timed, name) for name in contenders}, given.rounds)
    busy = {name: times[1:] for name, times in busy.items()}

    def row(what: str, name: str, target: float | None = None, note: str = "") -> bench.Row:
        speed = given.images / statistics.median(busy[name])
        return bench.Row(what, speed, "samples/s per core", bench.ratio(busy, name), target, note)

    rows = [
        row("training sample from files", "files"),
        row("training sample from the decoded cache", "cache", 15),
        row("the same, when a process reads it for the first time", "first", note="its checksum is compared"),
        bench.Row("building the cache", given.images / statistics.median(seconds["building"]), "images/s per core",
                  bench.ratio(seconds, "decoding", to="building"), 1.2,
                  "ratio: its time to one pass of decoding; to stay below"),
    ]  # fmt: skip
    if "reference" in seconds:
        rows.append(row("training sample of the reference", "reference"))
    loaders = {(name, workers): 0.0 for name in (None, "memmap") for workers in given.workers}
    for _ in range(3):
        for name, workers in loaders:
            speed = through_loader(module(root, folder, given.images, name, workers))
            loaders[name, workers] = max(speed, loaders[name, workers])
    for (name, workers), speed in loaders.items():
        what = f"data loader of {workers} workers, {'cache' if name else 'files'}"
        rows.append(bench.Row(what, speed, "samples/s", note="best of three"))
    sizes = [file.stat().st_size for sample in samples for file in (sample.image, sample.label)]
    bench.write("data", rows, images=str(given.root or given.photos or "synthetic scenes"), count=len(samples),
                megabytes_per_sample=round(sum(sizes) / len(samples) / 1e6, 2), threads=given.threads)  # fmt: skip


def scenes(root: Path, number: int, photos: Path | None) -> Path:
    """Synthetic scenes in the layout of Cityscapes; enlarged photographs take the place of the images."""
    from PIL import Image

    from bisenet.data import Synthetic

    Synthetic(root, train=number, val=0, test=0, size=SIZE).prepare()
    images = sorted(root.glob("leftImg8bit/train/*/*.png"))
    if photos:
        files = sorted(file for file in photos.rglob("*") if file.suffix.lower() in (".png", ".jpg"))
        for target, file in zip(images, files[:: max(1, len(files) // number)], strict=False):
            Image.open(file).convert("RGB").resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC).save(target)
    return root


def module(root: Path, folder: Path, limit: int, cache: str | None, workers: int = 0) -> Any:
    """The data of ``experiment=cityscapes_bisenetv2``."""
    from hydra import compose, initialize_config_dir

    import bisenet
    from bisenet import cli, experiment  # noqa: F401 - cli registers the resolvers

    with initialize_config_dir(bisenet.conf_dir(), version_base="1.3"):
        cfg = compose("train", ["experiment=cityscapes_bisenetv2", f"data.root={root}", f"data.limit={limit}",
                                f"data.cache={cache or 'null'}", f"data.cache_root={folder}/cache",
                                f"data.workers={workers}", "data.batch_size=4", "run_dir=."])  # fmt: skip
    return experiment.build_data(cfg)


def draw(data: Any) -> Callable[[int], Any]:
    """A function that reads and augments the next so many samples."""
    loader = data.train_dataloader()
    items: Iterator[Any] = (item for batch in loader.batch_sampler for item in batch)
    return lambda number: [loader.dataset[item] for item in islice(items, number)]


def theirs(samples: list[Any], folder: Path) -> Iterator[Any]:
    """Endless samples of the reference's data set, with its own transform."""
    listed = folder / "list.txt"
    listed.write_text("\n".join(f"{sample.image},{sample.label}" for sample in samples))
    augment = bench.reference("lib.data.transform_cv2").TransformationTrain([0.25, 2.0], [512, 1024])
    cityscapes = bench.reference("lib.data.cityscapes_cv2")
    cityscapes.labels_info = cityscapes.labels_info[:-1]  # the id -1, at which NumPy 2 stops
    dataset = cityscapes.CityScapes("", str(listed), trans_func=augment)
    return (dataset[number % len(samples)] for number in count())


def through_loader(data: Any, batches: int = 12) -> float:
    """Samples per second of the training's loader, once its workers are at work."""
    loaded = iter(data.train_dataloader())
    for _ in islice(loaded, 2 * data.workers + 1):  # batches that workers prepare before they are asked
        pass
    started = time.perf_counter()
    for _ in islice(loaded, batches):
        pass
    return batches * data.batch_size / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
