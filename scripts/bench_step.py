"""Training steps: forward, loss over all heads, backward, SGD.

    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench_step.py                    # V2 and V1, 2 x 512x1024, CPU
    REFERENCE_ROOT=... python scripts/bench_step.py --batch 16 --device cuda        # in fp16, as the recipes

Weights, images and labels are the same for all. Ours starts from uint8 images; the reference's, whose data loader
normalises, from floats. Its losses are read from the device at every step, as its training does; ours are not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import bench

LAYOUTS = ("contiguous", "channels_last")
MEMORY = {("bisenetv2", "fp32, channels_last"): 0.6, ("bisenetv2", "fp16, channels_last, cuda"): 0.5}


def main() -> None:
    """Measure the variants of both models in turn, and the memory of each in its own process."""
    options = bench.parser(__doc__)
    options.add_argument("--models", nargs="+", default=["bisenetv2", "bisenetv1"])
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--size", type=int, nargs=2, default=[512, 1024], metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = options.parse_args()
    rows = []
    for model in given.models:
        rows += compare(model, given.batch, (given.size[0], given.size[1]), given.device, given.rounds, given.threads)
    setup = {"batch": given.batch, "size": "{}x{}".format(*given.size), "device": given.device}
    bench.write("step", rows, **setup, threads=given.threads)


def compare(model: str, batch: int, size: tuple[int, int], device: str, rounds: int, threads: int) -> list[bench.Row]:
    """Rows of one model: our step in each precision, beside the reference's in the first."""
    variants = [("fp16", "contiguous", "torch"), ("fp16", "channels_last", "torch"), ("fp16", "channels_last", "cuda")]
    if device == "cpu":
        variants = [(precision, layout, "torch") for precision in ("fp32", "bf16") for layout in LAYOUTS]
    shared = (model, batch, size, device, threads)
    makers: dict[str, Callable[[], Callable[[], None]]] = {}
    for variant in variants:
        makers[", ".join(variant[: 2 if device == "cpu" else 3])] = partial(ours, *shared, *variant)
    if bench.has_reference():
        makers["reference"] = partial(theirs, *shared, variants[0][0])
    seconds = bench.in_turn({name: make() for name, make in makers.items()}, rounds)
    peaks = {name: bench.peak_of(make, device=device) for name, make in makers.items()}
    rows = []
    for name in (name for name in makers if name != "reference"):
        target = {"bisenetv2": 1.4, "bisenetv1": 1.3}[model] if name == "fp32, channels_last" else None
        target = 2.5 if name == "bf16, channels_last" else 2.0 if name.endswith("cuda") else target
        less = [peaks[name] / peaks["reference"]] * 3 if "reference" in peaks else None
        what = f"step of {model}, {name}"
        rows.append(bench.Row(what, 1 / min(seconds[name]), "steps/s", bench.ratio(seconds, name), target))
        rows.append(bench.Row(f"{what}: peak memory", peaks[name] / 2**30, "GiB", less, MEMORY.get((model, name))))
    return rows


def ours(
    model: str, batch: int, size: tuple[int, int], device: str, threads: int, precision: str, layout: str, loss: str
) -> Callable[[], None]:
    """A step of ``bisenet train``, without Lightning around it."""
    import torch
    from hydra import compose, initialize_config_dir

    import bisenet
    from bisenet import cli, experiment  # noqa: F401 - cli registers the resolvers

    torch.set_num_threads(threads)
    with initialize_config_dir(bisenet.conf_dir(), version_base="1.3"):
        cfg = compose(
            "train",
            [f"model={model}", "data=cityscapes", "trainer=cityscapes", "run_dir=.", f"loss.criterion.impl={loss}"],
        )
    data = experiment.build_data(cfg)
    module = experiment.build_module(cfg, data, experiment.build_segmenter(cfg, data)).to(device)
    network, criteria = module.segmenter.network, module.loss
    if layout == "channels_last":
        network.to(memory_format=torch.channels_last)
    optimizer, _ = module.optimizer_factory(network)
    image, label = batch_of(batch, size, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=precision != "fp32"):
            output = network(module.segmenter.normalize(image))
            total = criteria(output, label, align_corners=bool(network.align_corners)).total
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def theirs(
    model: str, batch: int, size: tuple[int, int], device: str, threads: int, precision: str
) -> Callable[[], None]:
    """A step of the reference's ``tools/train_amp.py``."""
    import torch

    torch.set_num_threads(threads)
    factory, loss = bench.reference("lib.models").model_factory, bench.reference("lib.ohem_ce_loss").OhemCELoss
    network = factory[model](19).to(device).train()
    criteria = [loss(0.7, 255) for _ in range({"bisenetv1": 3, "bisenetv2": 5}[model])]
    decayed, plain, decayed_heads, plain_heads = network.get_params()
    groups = [
        {"params": decayed},
        {"params": plain, "weight_decay": 0},
        {"params": decayed_heads, "lr": 5e-2},
        {"params": plain_heads, "weight_decay": 0, "lr": 5e-2},
    ]
    optimizer = torch.optim.SGD(groups, lr=5e-3, momentum=0.9, weight_decay=5e-4)
    image, label = batch_of(batch, size, device)
    image, label = (image / 255 - 0.5) / 0.25, label.long()
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16, enabled=precision == "fp16"):
            losses = [criterion(logits, label) for criterion, logits in zip(criteria, network(image), strict=True)]
            total = sum(losses)
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        [one.item() for one in (total, *losses)]

    return step


def batch_of(batch: int, size: tuple[int, int], device: str) -> tuple[Any, Any]:
    """Random images, uint8, and labels in blocks of 32 pixels, a twentieth of them ignored."""
    import torch

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
    blocks = torch.randint(0, 20, (batch, size[0] // 32, size[1] // 32), generator=generator)
    label = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2).to(torch.uint8)
    return image.to(device), label.masked_fill(label == 19, 255).to(device)


if __name__ == "__main__":
    main()
