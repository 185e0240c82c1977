"""The networks: golden sizes, shapes for any input, initialisation, and parity with the reference implementation.

The reference is github.com/CoinCheung/BiSeNet at commit 6b4b67a. Its parameter names and outputs are recorded in
tests/data/networks; `python tests/test_networks.py <checkout>` records them again.
"""

import contextlib
import copy
import importlib
import json
import math
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from conftest import composed
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import model_zoo
from torch.utils.flop_counter import FlopCounterMode

import bisenet
from bisenet.networks import BiSeNetV1, BiSeNetV2, SegmentationOutput, bisenetv2, blocks
from bisenet.networks.blocks import Generation, PositiveBatchNorm, SegmentationNetwork, pool_globally

ROOT = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).parent / "data" / "networks"

VARIANTS: dict[str, Callable[..., SegmentationNetwork]] = {
    "bisenetv1": BiSeNetV1,
    "bisenetv1_diss": lambda n, **options: BiSeNetV1(n, structure="one_path", **options),
    "bisenetv1_ushape": lambda n, **options: BiSeNetV1(n, structure="u_shape", **options),
    "bisenetv2": BiSeNetV2,
    "bisenetv2_large": lambda n, **options: BiSeNetV2(n, width_multiplier=2, depth_multiplier=3, **options),
}
GENERATIONS, LENGTHS = ("current", "older"), st.integers(64, 130)
OLDEST = {"generation": "older", "norm": "inplace_abn"}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("variant", "generation", "with_aux", "without_aux", "gmacs"),
    [
        ("bisenetv1", "current", 13_425_721, 13_275_539, 118.3),
        ("bisenetv1", "older", 13_392_384, 13_242_240, None),
        ("bisenetv1_diss", "current", 13_333_753, 13_183_571, 107.1),
        ("bisenetv1_diss", "older", 13_300_416, 13_150_272, None),
        ("bisenetv1_ushape", "current", 12_037_881, 11_887_699, 92.6),
        ("bisenetv2", "current", 5_231_487, 3_358_627, 98.4),
        ("bisenetv2", "older", 3_645_935, 3_358_627, None),
        ("bisenetv2_large", "current", 19_689_487, 17_540_147, 332.3),
    ],
)
def test_parameters_and_multiply_adds_at_1024x2048(
    variant: str, generation: str, with_aux: int, without_aux: int, gmacs: float | None
) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = VARIANTS[variant](19, generation=generation).eval()
        assert parameters(network) == with_aux
        assert parameters(VARIANTS[variant](19, generation=generation, aux=False)) == without_aux
        network(torch.empty(1, 3, 1024, 2048))
    assert gmacs is None or counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.05)


def heads(variant: str, generation: str) -> list[tuple[int, int]]:
    """Stride of the feature that each head reads, and how often it is enlarged before the logits."""
    if variant == "bisenetv1_ushape":
        return [(8, 1), (16, 1), (32, 1)]
    if variant.startswith("bisenetv1"):
        return [(8, 1), (8, 1), (16, 1)]
    return [(8, 1), *((stride, 2 if generation == "current" else 1) for stride in (4, 8, 16, 32))]


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(list(VARIANTS)[:-1]), st.sampled_from(GENERATIONS), LENGTHS, LENGTHS, st.integers(2, 30))
def test_every_input_size_from_64_works(variant: str, generation: str, height: int, width: int, n_classes: int) -> None:
    network = VARIANTS[variant](n_classes, generation=generation)
    image = images(2, height, width)
    expected = [
        (2, n_classes, factor * math.ceil(height / stride), factor * math.ceil(width / stride))
        for stride, factor in heads(variant, generation)
    ]
    with torch.no_grad():
        trained, evaluated = network.train()(image), network.eval()(image)
    assert isinstance(trained, SegmentationOutput)
    assert [tuple(logits.shape) for logits in (trained.logits, *trained.aux)] == expected
    assert len(expected) == len(network.head_names)
    assert tuple(evaluated.logits.shape) == expected[0]
    assert evaluated.aux == ()
    assert all(logits.isfinite().all() for logits in (trained.logits, *trained.aux, evaluated.logits))
    assert network.align_corners is (generation == "older")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_finite_gradient(variant: str) -> None:
    network = VARIANTS[variant](5, **(OLDEST if "v1" in variant else {})).train()
    output = network(images(2, 64, 64))
    torch.stack([logits.square().mean() for logits in (output.logits, *output.aux)]).sum().backward()
    wrong = [name for name, w in network.named_parameters() if w.grad is None or not w.grad.isfinite().all()]
    assert not wrong


@pytest.mark.parametrize("generation", ["current", "older"])
def test_computing_again_in_the_backward_pass_saves_memory_and_changes_no_bit(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(checkpoint: Callable[..., Tensor]) -> tuple[list[Tensor], int]:
        monkeypatch.setattr(blocks, "checkpoint", lambda layers, x, **options: checkpoint(layers, hold(x), **options))
        held: dict[int, int] = {}

        def hold(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        network = BiSeNetV2(5, width_multiplier=0.5, generation=generation).train()
        for _ in range(2):  # the second step sees what the first one made of statistics and random numbers
            with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
                output = network(images(2, 64, 96))
            torch.stack([logits.square().mean() for logits in (output.logits, *output.aux)]).sum().backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        return [*gradients, *network.buffers(), torch.rand(3)], sum(held.values())

    frugal, less = trained(blocks.checkpoint)
    plain, more = trained(lambda layers, x, **_: layers(x))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(frugal, plain, strict=True))
    print(less / more)
    assert less < 0.7 * more


@pytest.mark.parametrize("variant", ["bisenetv1", "bisenetv2"])
def test_a_network_without_auxiliary_heads_returns_none_and_the_same_main_head(variant: str) -> None:
    full, bare = VARIANTS[variant](4).eval(), VARIANTS[variant](4, aux=False)
    bare.load_state_dict(full.state_dict(), strict=False)
    assert bare.head_names == full.head_names[:1]
    assert bare.train()(images(2, 64, 64)).aux == ()
    bare.load_state_dict(full.state_dict(), strict=False)  # training moved the statistics
    assert torch.equal(bare.eval()(images(1, 64, 64)).logits, full(images(1, 64, 64)).logits)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "options"), [("bisenetv1", {"norm": "inplace_abn"}), ("bisenetv2", {})])
def test_the_network_is_one_graph(variant: str, options: dict[str, str]) -> None:
    torch.compile(VARIANTS[variant](4, **options).train(), backend="eager", fullgraph=True)(images(2, 64, 64))


@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [
        ("bisenetv1", "generation", "new"),
        ("bisenetv1", "structure", "diss"),
        ("bisenetv1", "norm", "gn"),
        ("bisenetv2", "generation", ""),
        ("bisenetv2", "width_multiplier", 0),
        ("bisenetv2", "depth_multiplier", 1.5),
    ],
)
def test_an_impossible_argument_is_named(variant: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
        VARIANTS[variant](19, **{name: value})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shipped_configuration_builds_and_its_output_layers_exist(variant: str) -> None:
    with hydra.initialize_config_dir(str(ROOT / "conf" / "model"), version_base="1.3"), torch.device("meta"):
        config = hydra.compose(variant)
        network = hydra.utils.instantiate(config.network, n_classes=19)
    assert parameters(network) == parameters(VARIANTS[variant](19))
    children = dict(network.named_children())
    assert set(network.head_names) <= set(config.output_layers) <= set(children)
    assert ("ffm" in config.output_layers) == ("ffm" in children)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("bisenetv1", {}), ("bisenetv1_diss", OLDEST), ("bisenetv2", {}), ("bisenetv2", {"generation": "older"})],
)
def test_one_image_in_training_is_refused_where_a_pooled_map_is_normalised(variant: str, options: Any) -> None:
    network, image = VARIANTS[variant](4, **options), images(1, 64, 64)
    with pytest.raises(ValueError, match="batch of 1 image"):
        network.train()(image)
    network.eval()(image)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | PositiveBatchNorm):
            module.eval()
    assert len(network(image).aux) == len(network.head_names) - 1


def test_one_image_trains_where_nothing_is_pooled_or_the_norm_is_synchronised() -> None:
    VARIANTS["bisenetv1_ushape"](4).train()(images(1, 64, 64))
    for norm in (nn.SyncBatchNorm(3), None):
        assert pool_globally(images(1, 8, 8), norm).shape == (1, 3, 1, 1)


def test_the_older_norm_survives_synchronisation_copies_and_checkpoints() -> None:
    network = BiSeNetV1(4, generation="older", norm="inplace_abn").double().eval()
    fill(network)
    state, image = network.state_dict(), images(1, 64, 64, torch.float64)
    assert any((values < 0).any() for name, values in state.items() if name.endswith("bn.weight"))
    expected = network(image).logits

    for twin in (copy.deepcopy(network), nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))):
        assert list(twin.state_dict()) == list(state)
        twin.load_state_dict(state)
        torch.testing.assert_close(twin(image).logits, expected)
    kinds = [type(module) for module in twin.modules()]  # of the converted one
    assert kinds.count(nn.SyncBatchNorm) == kinds.count(PositiveBatchNorm) > 0
    assert nn.BatchNorm2d not in kinds

    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        network.load_state_dict(BiSeNetV1(4, generation="older").state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation_follows_the_table(variant: str) -> None:
    torch.manual_seed(0)
    network = VARIANTS[variant](19)
    layers = bisenetv2.GatherExpand | bisenetv2.GatherExpandDown
    last_norms = {list(module.conv2)[1] for module in network.modules() if isinstance(module, layers)}  # type: ignore
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            out_channels, in_channels, height, width = module.weight.shape
            fan_in, fan_out = in_channels * height * width, out_channels * height * width
            he = "v2" in variant or name.startswith("cp.resnet")
            variance, size = 2 / fan_out if he else 1 / fan_in, module.weight.numel()
            # Within 6 standard deviations of a sample's variance and mean.
            assert module.weight.var().item() == pytest.approx(variance, rel=6 * math.sqrt(2 / size)), name
            assert abs(module.weight.mean().item()) < 6 * math.sqrt(variance / size), name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == (0 if module in last_norms else 1)).all(), name
            assert not module.bias.any()
    assert bool(last_norms) == ("v2" in variant)


# --- parity with the reference ---------------------------------------------------------------------------------------

REFERENCES: dict[str, tuple[str, str, str, str, dict[str, str]]] = {
    # folder on the import path, module, class; the same network of ours
    "bisenetv1": (".", "lib.models.bisenetv1", "BiSeNetV1", "bisenetv1", {}),
    "bisenetv2": (".", "lib.models.bisenetv2", "BiSeNetV2", "bisenetv2", {}),
    "older_bisenetv1": ("old", "model", "BiSeNet", "bisenetv1", OLDEST),
    "older_bisenetv1_diss": ("old", "diss.model", "BiSeNet", "bisenetv1_diss", OLDEST),
    "older_bisenetv1_fp16": ("old", "fp16.model", "BiSeNet", "bisenetv1", {"generation": "older"}),
    "older_bisenetv2": ("old", "bisenetv2.bisenetv2", "BiSeNetV2", "bisenetv2", {"generation": "older"}),
}


def filling(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values for a weight or statistic that depend on its name and shape alone, norm weights of both signs."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    uniform = torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).random(shape))
    if name.endswith("running_var"):
        return uniform + 0.5
    return 2 * uniform - 1 if len(shape) == 1 else (uniform - 0.5) * math.sqrt(12 / math.prod(shape[1:]))


def fill(network: nn.Module) -> None:
    """Give every weight and statistic its filling."""
    for name, tensor in network.state_dict().items():
        tensor.copy_(filling(name, tuple(tensor.shape)))


def described(network: nn.Module) -> list[str]:
    return sorted(f"{name} {list(tensor.shape)}" for name, tensor in network.state_dict().items())


def deterministic(network: nn.Module) -> nn.Module:
    """In double precision, so that the comparison does not depend on the machine, and without dropout."""
    network = network.double()
    fill(network)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def logits_of(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Logits at the size of the image: ours upsampled as the network asks, the reference's as they are."""
    output = network(image)
    if not isinstance(network, SegmentationNetwork):
        return list(output)
    size, align = image.shape[2:], network.align_corners
    return [F.interpolate(x, size, mode="bilinear", align_corners=align) for x in (output.logits, *output.aux)]


def sampled_logits(network: nn.Module) -> dict[str, np.ndarray]:
    """Return a sparse sample of the main head in eval mode and of every head in training."""
    image = images(3, 64, 96, torch.float64)
    with torch.no_grad():
        evaluated, trained = logits_of(network.eval(), image)[:1], logits_of(network.train(), image)
    heads = {"eval": evaluated[0]} | {f"train_{index}": logits for index, logits in enumerate(trained)}
    return {head: logits[:, ::6, ::13, ::17].numpy().astype(np.float32) for head, logits in heads.items()}


def inplace_abn_sync(x, weight, bias, mean, var, training, momentum, eps, activation, slope) -> Tensor:
    """Compute what the CUDA extension of the older generation computes on one device."""
    x = F.batch_norm(x, mean, var, weight.abs() + eps, bias, training, momentum, eps)
    return F.leaky_relu(x, slope) if activation == "leaky_relu" else x


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make the modules of a reference checkout importable, with what it cannot have here replaced by the least."""
    before = set(sys.modules)
    package, functions = types.ModuleType("modules"), types.ModuleType("modules.functions")
    package.__path__ = [str(folder / "modules")]
    vars(functions).update({f"ACT_{name.upper()}": name for name in ("relu", "leaky_relu", "elu", "none")})
    vars(functions)["inplace_abn_sync"] = inplace_abn_sync
    stubs = {"torchvision": types.ModuleType("torchvision"), "modules": package, "modules.functions": functions}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(model_zoo, "load_url", lambda _url: {})
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        yield
        for name in set(sys.modules) - before - set(stubs):
            del sys.modules[name]


@pytest.mark.parametrize("name", REFERENCES)
def test_names_shapes_and_logits_equal_the_recorded_reference(name: str) -> None:
    *_, variant, options = REFERENCES[name]
    network = VARIANTS[variant](19, **options)
    with np.load(RECORDED / f"{name}.npz") as recorded:
        assert described(network) == recorded["state"].tolist()
        actual = sampled_logits(deterministic(network))
        assert set(actual) | {"state"} == set(recorded)
        for head, logits in actual.items():
            np.testing.assert_allclose(logits, recorded[head], rtol=0, atol=1e-5 * np.abs(recorded[head]).max())


def test_published_weights_for_face_parsing_load(tmp_path: Path) -> None:
    """Those of zllrunning/face-parsing.PyTorch: the older V1-diss, with plain batch norm in place of InPlaceABN."""
    with np.load(RECORDED / "older_bisenetv1_diss.npz") as recorded:
        names = [name.split(" ", 1)[0] for name in recorded["state"]]
        shapes = [json.loads(name.split(" ", 1)[1]) for name in recorded["state"]]
    weights = {name: filling(name, tuple(shape)).float() for name, shape in zip(names, shapes, strict=True)}
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in names if "_var" in name}
    torch.save(weights | counters, tmp_path / "79999_iter.pth")
    data: Any = OmegaConf.to_container(composed("data=celebamask").data)
    model = bisenet.load(tmp_path / "79999_iter.pth", data)
    expected = BiSeNetV1(19, structure="one_path", generation="older").eval()
    expected.load_state_dict(weights | counters)
    image = images(1, 64, 64)
    assert torch.equal(model.network.eval()(image).logits, expected(image).logits)
    assert (model.classes.names[1], model.classes.names[18]) == ("skin", "hat")
    assert model.protocols["ss"].short_side == 512
    assert model.predict(np.zeros((70, 90, 3), np.uint8)).shape == (70, 90)


def record(checkout: Path) -> None:
    """Write names, shapes and sampled logits of every network of the reference."""
    for name, (folder, module, cls, *_) in REFERENCES.items():
        with importable(checkout / folder):
            network = getattr(importlib.import_module(module), cls)(19)
        arrays: dict[str, Any] = {"state": np.array(described(network)), **sampled_logits(deterministic(network))}
        np.savez_compressed(RECORDED / f"{name}.npz", **arrays)


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve())
