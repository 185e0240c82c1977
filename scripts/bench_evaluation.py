"""Evaluation under each protocol, and under all in one pass, beside the reference's on the same images and weights.

    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench_evaluation.py --rounds 3
    REFERENCE_ROOT=... python scripts/bench_evaluation.py --checkpoint outputs/demo/<date_time>

Synthetic street scenes stand for the images. Without a checkpoint the weights are random, and the norms have the
statistics of such scenes, so that all classes are predicted. The reference's pass of all is the sum of its four. Labels
that differ and mIoU are those of the last round. Decoding is in no time; weights and images are in no memory.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import bench

TARGETS = {"msf": 1.2, "mscf": 1.3, "all in one pass": 1.4}
PROTOCOLS = ("ss", "ssc", "msf", "mscf")
Labels = dict[str, list[Any]]
"""Protocol -> train ids (1, H, W) of each image."""


def main() -> None:
    """Measure the protocols in turn, and the memory of each in its own process."""
    options = bench.parser(__doc__)
    options.add_argument("--checkpoint", help="a run or a .ckpt file of 19 classes; default: random weights")
    options.add_argument(
        "--model", default="bisenetv2", choices=["bisenetv1", "bisenetv2"], help="without a checkpoint"
    )
    options.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    options.add_argument("--images", type=int, default=1)
    options.add_argument("--size", type=int, nargs=2, default=[512, 1024], metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--window", type=int, default=512, help="side of the windows of protocols that crop")
    given = options.parse_args()
    found: dict[str, Labels] = {}
    makers: dict[str, Callable[[], Callable[[], Labels]]] = {}
    for name in given.protocols:
        makers[name] = partial(ours, given, [name])
        if bench.has_reference():
            makers[f"reference {name}"] = partial(theirs, given, name)
    together = "all in one pass"
    makers[together] = partial(ours, given, given.protocols)

    def kept(name: str, work: Callable[[], Labels]) -> Callable[[], None]:
        return lambda: found.update({name: work()})

    seconds = bench.in_turn({name: kept(name, make()) for name, make in makers.items()}, given.rounds)
    peaks = {name: bench.peak_of(make) for name, make in makers.items()}
    rows = []
    for name in [*given.protocols, together]:
        rivals = [f"reference {one}" for one in (given.protocols if name == together else [name])]
        compared = rivals[0] in seconds
        pair = {name: seconds[name]}
        if compared:
            pair["reference"] = [sum(each) for each in zip(*(seconds[rival] for rival in rivals), strict=True)]
        less = [peaks[name] / max(peaks[rival] for rival in rivals)] * 3 if compared else None
        note = "; ".join(agreement(given, one, found[name], found.get(f"reference {one}")) for one in found[name])
        speed = given.images / min(seconds[name])
        rows.append(bench.Row(name, speed, "images/s", bench.ratio(pair, name), TARGETS.get(name), note))
        rows.append(bench.Row(f"{name}: peak memory", peaks[name] / 2**30, "GiB", less, 1.0))
    bench.write("evaluation", rows, **{key: str(value) for key, value in vars(given).items()})


def agreement(given: Any, name: str, own: Labels, other: Labels | None) -> str:
    """The mIoU of both, and how many labels differ."""
    import torch

    from bisenet.metrics import SegmentationMetric

    masks = [mask for _, mask in scenes(given, segmenter_of(given).classes)]

    def miou(labels: Labels) -> str:
        metric = SegmentationMetric(19)
        for number, (found, mask) in enumerate(zip(labels[name], masks, strict=True)):
            metric.update(found, mask, torch.tensor([number]))
        return f"{100 * metric.compute().miou:.4f}"

    if other is None:
        return f"{name}: mIoU {miou(own)}"
    differ = sum(int((a != b).sum()) for a, b in zip(own[name], other[name], strict=True))
    total = sum(mask.numel() for mask in masks)
    return f"{name}: mIoU {miou(own)} and {miou(other)}, {differ} of {total} labels differ"


def scenes(given: Any, classes: Any) -> list[tuple[Any, Any]]:
    """Images (1, 3, H, W) and masks (1, H, W) of train ids, uint8."""
    import torch

    from bisenet.data.scenes import render_scene

    drawn = [render_scene(0, "val", number, tuple(given.size)) for number in range(given.images)]
    return [(torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(classes.encode[mask])[None])
            for image, mask in drawn]  # fmt: skip


def segmenter_of(given: Any) -> Any:
    """The model with the protocols, from the checkpoint or with random weights."""
    import torch
    from hydra import compose, initialize_config_dir

    import bisenet
    from bisenet import cli, experiment
    from bisenet.data.scenes import render_scene

    torch.set_num_threads(given.threads)
    with initialize_config_dir(bisenet.conf_dir(), version_base="1.3"):
        window = f"data.eval_window=[{given.window},{given.window}]"
        cfg = compose("train", [f"model={given.model}", f"protocol=[{','.join(given.protocols)}]", window])
    cli.name_changed_presets(cfg)
    segmenter = experiment.build_segmenter(cfg, experiment.build_data(cfg))
    if given.checkpoint:
        trained = bisenet.load(given.checkpoint)
        trained.protocols = segmenter.protocols
        return trained
    for module in segmenter.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # what was seen last
    some = [torch.from_numpy(render_scene(0, "train", number, (256, 512))[0]).permute(2, 0, 1) for number in range(4)]
    with torch.no_grad():
        segmenter.network.train()(segmenter.normalize(torch.stack(some)))
    return segmenter.eval()


def ours(given: Any, names: list[str]) -> Callable[[], Labels]:
    """Our evaluation of images in memory."""
    import torch

    segmenter = segmenter_of(given)
    images = [image for image, _ in scenes(given, segmenter.classes)]

    @torch.inference_mode()
    def work() -> Labels:
        found = [segmenter.predictions(image, names) for image in images]
        return {name: [one[name].train_ids for one in found] for name in names}

    return work


def theirs(given: Any, protocol: str) -> Callable[[], Labels]:
    """The reference's evaluator, with our weights."""
    segmenter = segmenter_of(given)
    reference = bench.reference("tools.evaluate")
    kind = {"BiSeNetV1": "bisenetv1", "BiSeNetV2": "bisenetv2"}[type(segmenter.network).__name__]
    network = importlib.import_module("lib.models").model_factory[kind](19)
    network.load_state_dict(segmenter.network.state_dict())
    network.aux_mode = "eval"
    network.eval()
    several = protocol in ("msf", "mscf")
    common: dict[str, Any] = {"n_classes": 19, "size_processor": reference.SizePreprocessor(), "flip": several,
                              "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if several else (1.0,)}  # fmt: skip
    crops = protocol in ("ssc", "mscf")
    evaluator = reference.MscEvalCrop(cropsize=given.window, **common) if crops else reference.MscEvalV0(**common)
    batches = [(segmenter.normalize(image), mask[:, None].long()) for image, mask in scenes(given, segmenter.classes)]
    found: list[Any] = []
    evaluator.metric_observer.update = lambda predicted, _: found.append(predicted)

    def work() -> Labels:
        found.clear()
        evaluator(network, batches)
        return {protocol: list(found)}

    return work


if __name__ == "__main__":
    main()
