"""The benchmark: every combination is measured, sizes are the networks', and a runtime that fails costs one row."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PYTHONPATH, ROOT, command

from bisenet import benchmark
from bisenet.networks import BiSeNetV1, BiSeNetV2
from bisenet.report import plot_speed


def run(**changed: object) -> dict:
    options = {"sizes": [(64, 64)], "batches": [1], "precisions": ["fp32"], "runtimes": ["eager"], "device": "cpu",
               "warmup": 0, "runs": 2} | changed  # fmt: skip
    return benchmark.benchmark({"v2": (BiSeNetV2(19, width_multiplier=0.25), 0.7)}, **options)  # type: ignore[arg-type]


def test_every_combination_is_a_row() -> None:
    found = run(sizes=[(64, 64), (64, 128)], batches=[1, 2], precisions=["fp32", "bf16"])
    kinds = {(row["size"], row["batch"], row["precision"], row["runtime"]) for row in found["rows"]}
    assert len(kinds) == len(found["rows"]) == 8
    assert not found["failed"]
    for row in found["rows"]:
        assert 0 < row["median_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
        assert row["parameters_training"] > row["parameters"] > 0
    assert found["provenance"]["hardware"]["threads"] == torch.get_num_threads()
    assert found["timed"] == "network alone"


def test_parameters_and_multiply_adds_are_those_of_the_size() -> None:
    with torch.device("meta"):
        found = benchmark.describe(BiSeNetV1(19), (1024, 2048))
    assert (found["parameters_training"], found["parameters"]) == (13_425_721, 13_275_539)
    assert found["gmacs"] == pytest.approx(118.3, abs=0.05)


@pytest.mark.parametrize(
    "runtime",
    ["folded", "openvino", *(pytest.param(name, marks=pytest.mark.slow) for name in ("compiled", "onnxruntime"))],
)
def test_a_runtime_computes_what_the_network_does(runtime: str) -> None:
    if runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
    network, image = BiSeNetV2(5, width_multiplier=0.25).eval(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        actual = benchmark.RUNTIMES[runtime](network, image)(image)
        torch.testing.assert_close(actual, network(image).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_lower_precision_of_an_export_is_the_runtimes_own() -> None:
    pytest.importorskip("openvino")
    found = run(runtimes=["onnxruntime", "openvino"], precisions=["bf16"])
    assert [row["runtime"] for row in found["rows"]] == ["openvino"]
    assert found["failed"] == {"v2, 64x64, 1, bf16, onnxruntime": "precision bf16 of onnxruntime: accepted: f32"}


def test_a_runtime_that_fails_costs_one_row_and_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(network: object, image: object) -> benchmark.Run:
        raise RuntimeError("no driver")

    monkeypatch.setitem(benchmark.RUNTIMES, "broken", broken)
    found = run(runtimes=["broken", "eager"], processing=True)
    assert [row["runtime"] for row in found["rows"]] == ["eager"]
    assert found["failed"] == {"v2, 64x64, 1, fp32, broken": "no driver"}
    assert found["timed"] == "transfer, normalisation, network, upsampling, argmax"
    benchmark.write(found, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"benchmark.{kind}" for kind in ("json", "csv", "png")}


def test_no_number_of_the_table_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = run(sizes=[(64, 64)])
    long = {"size": "1024x2048", "runtime": "onnxruntime", "median_ms": 1801.0, "p90_ms": 1976.0, "p99_ms": 2003.0,
            "images_per_second": 1234.0, "peak_mib": 380.2}  # fmt: skip
    found["rows"][0] |= long
    benchmark.write(found, tmp_path)
    shown = capsys.readouterr().out
    assert all(number in shown for number in ("1024x2048", "onnxruntime", "1801", "1976", "2003", "1234", "380.2"))


def test_memory_is_what_a_run_adds() -> None:
    before = benchmark._memory("cpu", reset=True)
    if before is None:
        pytest.skip("the peak of a process is told by Linux only")
    taken = np.ones(2**24)  # 128 MiB
    after = benchmark._memory("cpu")
    assert after is not None
    assert after - before == pytest.approx(taken.nbytes, rel=0.2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"runtimes": ["tpu"]}, "runtimes: got 'tpu'"), ({"precisions": ["int4"]}, "precisions: got 'int4'"),
     ({"sizes": [(32, 64)]}, "sizes"), ({"batches": [0]}, "batches"), ({"runs": 0}, "runs")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changed)


def test_speed_is_drawn_for_what_has_a_score(tmp_path: Path) -> None:
    row = {"model": "a", "size": "64x64", "batch": 1, "precision": "fp32", "runtime": "eager", "images_per_second": 9.0}
    plot_speed([row | {"miou": 0.7}, row | {"model": "b", "miou": None}], "cpu", tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_command_measures_the_options_of_model(tmp_path: Path) -> None:
    done = command("benchmark", "models=[bisenetv1_diss,bisenetv2]", "sizes=[[64,64]]", "runs=2", "hydra.run.dir=out",
                  cwd=tmp_path)  # fmt: skip
    assert "network alone on " in done.stdout
    with (tmp_path / "out" / "benchmark.csv").open() as stream:
        rows = [(row["model"], row["runtime"]) for row in csv.DictReader(stream)]
    assert rows == [(model, runtime) for model in ("bisenetv1_diss", "bisenetv2") for runtime in ("eager", "folded")]
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text())["provenance"]["versions"]["torch"]


@pytest.mark.slow
def test_the_benchmark_of_steps_writes_what_it_measured(tmp_path: Path) -> None:
    step = [sys.executable, ROOT / "scripts" / "bench_step.py", "--models", "bisenetv2", "--size", "64", "128"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    subprocess.run([*step, "--rounds", "1"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    (file,) = tmp_path.glob("outputs/benchmarks/step_*.json")
    rows = {row["what"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 8
    assert all(value > 0 for value in rows.values())
