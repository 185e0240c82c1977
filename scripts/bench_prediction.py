"""From an image in memory to its labels, one at a time, in each runtime; and predict.py on a folder.

    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench_prediction.py

All start from the uint8 image: normalisation, network, upsampling, argmax. "as trained" is the network with its norms,
"default" what `bisenet.load(...).predict` does: norms folded, channels_last where that is faster. Weights are random,
with norms that have the statistics of synthetic scenes. Of the folder, the share of the time in which the network runs.
"""

import logging
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench
import bench_evaluation

TARGETS = {"default": 1.5, "openvino": 2.0}


def main() -> None:
    """Measure the runtimes of both models in turn, and a folder."""
    options = bench.parser(__doc__)
    options.add_argument("--models", nargs="+", default=["bisenetv2", "bisenetv1"])
    options.add_argument("--size", type=int, nargs=2, default=[512, 1024], metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--folder", type=int, default=30, help="images of the folder")
    given = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            rows += compare(model, given, Path(folder, model))
    setup = {"size": "{}x{}".format(*given.size), "batch": 1, "images": given.folder, "threads": given.threads}
    bench.write("prediction", rows, **setup)


def compare(model: str, given: Any, folder: Path) -> list[bench.Row]:
    """Rows of one model."""
    import torch

    from bisenet.data.scenes import render_scene
    from bisenet.inference import Protocol, predict

    evaluation = Namespace(model=model, checkpoint=None, window=512, protocols=["ss"], threads=given.threads)
    segmenter = bench_evaluation.segmenter_of(evaluation)
    images = [torch.from_numpy(render_scene(0, "val", number, tuple(given.size))[0]).permute(2, 0, 1)[None]
              for number in range(4)]  # fmt: skip

    def as_trained(image: Any) -> Any:
        return predict(segmenter.network, segmenter.normalize(image), [Protocol()])[0].train_ids

    run: dict[str, Callable[[Any], Any]] = {"as trained": as_trained, "default": segmenter}
    if bench.has_reference():
        run["reference"] = theirs(model, segmenter)
    for kind, exported in export(segmenter, model, folder, given.threads).items():
        run[kind] = partial(lambda exported, image: torch.from_numpy(exported.run(image.float().numpy())), exported)
    expected = [run.get("reference", as_trained)(image) for image in images]
    with torch.inference_mode():
        seconds = bench.in_turn({name: partial(one, images[0]) for name, one in run.items()}, given.rounds)
        differ = {name: sum(int((one(image) != labels).sum()) for image, labels in zip(images, expected, strict=True))
                  for name, one in run.items()}  # fmt: skip
    total = sum(labels.numel() for labels in expected)
    rows = []
    for name in (name for name in run if name != "reference"):
        note = f"{differ[name]} of {total} labels differ"
        speed = 1 / min(seconds[name])
        rows.append(
            bench.Row(f"{model}, {name}", speed, "images/s", bench.ratio(seconds, name), TARGETS.get(name), note)
        )
    share = 100 * share_of_network(segmenter, given, folder / "images")
    rows.append(bench.Row(f"{model}, a folder: the network runs", share, "% of the time", note="target 95 %"))
    return rows


def theirs(model: str, segmenter: Any) -> Callable[[Any], Any]:
    """The reference's network and argmax."""
    import torch

    network = bench.reference("lib.models").model_factory[model](19, aux_mode="eval")
    network.load_state_dict(segmenter.network.state_dict(), strict=False)
    network.eval()

    @torch.no_grad()
    def run(image: Any) -> Any:
        return network(segmenter.normalize(image))[0].argmax(1)

    return run


def export(segmenter: Any, model: str, folder: Path, threads: int) -> dict[str, Any]:
    """Files of the runtimes, loaded, by format."""
    from bisenet import checkpoint, runtimes
    from bisenet.export import Export

    logging.getLogger("bisenet").setLevel(logging.ERROR)
    folder.mkdir()
    target = {"bisenetv1": "BiSeNetV1", "bisenetv2": "BiSeNetV2"}[model]
    facts = {"name": "cityscapes", "eval_window": None, "eval_short_side": None}
    portable = checkpoint.portable({"_target_": f"bisenet.networks.{target}"}, segmenter, facts)
    checkpoint.write(folder / "model.ckpt", segmenter.network.state_dict(), 0, portable, {})
    read = checkpoint.read(folder / "model.ckpt")
    made = Export(["onnx", "openvino"], folder).run(read, segmenter, {})
    return {one["format"]: runtimes.open_file(one["files"][0], threads) for one in made}


def share_of_network(segmenter: Any, given: Any, folder: Path) -> float:
    """Of the time of `predict.py` on a folder of PNG files, overlays and masks written, without its start."""
    import cv2

    from bisenet.data.scenes import render_scene
    from bisenet.predict import Predictions

    folder.mkdir()
    cv2.setNumThreads(given.threads)
    for number in range(given.folder):
        image = render_scene(0, "val", number % 5, tuple(given.size))[0]
        cv2.imwrite(str(folder / f"{number}.png"), image[..., ::-1])
    seconds, whole = 0.0, segmenter.predict

    def timed(rgb: Any) -> Any:
        nonlocal seconds
        started = time.perf_counter()
        mask = whole(rgb)
        seconds += time.perf_counter() - started
        return mask

    segmenter.predict = timed
    started = time.perf_counter()
    Predictions(folder, folder.parent / "out", train_ids=True).run(segmenter)
    return seconds / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
