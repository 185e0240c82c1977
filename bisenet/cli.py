"""The command ``bisenet``: composition by Hydra, answers to mistakes, and what each subcommand calls.

Composition knows every key, since all of them stand in ``conf/``: a misspelt one is answered at once, before torch is
imported. A wrong value is answered by the constructor that takes it.
"""

import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bisenet import conf_dir, launch, sweep

log = logging.getLogger(__name__)

RENAMED = {
    "optimizer.algorithm": "optimizer",
    "optimizer.output_lr_multiplier": "output_lr_multiplier",
    "optimizer.norm_bias_weight_decay": "norm_bias_weight_decay",
    "optimizer.groups": "parameter_groups",
    "loss.name": "loss",
    **{
        f"loss.{key}": f"loss.criterion.{key}"
        for key in ("threshold", "min_kept", "normalizer", "class_weights", "impl")
    },
    "trainer.val_interval": "trainer.val_check_interval",
    "trainer.checkpoint_interval": "callbacks.last.every_n_steps",
    "trainer.log_interval": "trainer.log_every_n_steps",
    "trainer.accumulate": "trainer.accumulate_grad_batches",
    "trainer.gradient_clip": "trainer.gradient_clip_val",
    "trainer.ema_decay": "callbacks=[default,ema] callbacks.ema.decay",
    "trainer.compile": "compile",
    "trainer.progress": "~callbacks.progress",
    "deterministic": "trainer.deterministic",
    "strategy.sync_batchnorm": "trainer.sync_batchnorm",
    "strategy.name": "strategy",
    "precision.name": "precision",
    "scheduler.name": "scheduler",
    "augment.scale": "augment.crop.scale",
    "augment.scale_mode": "augment.crop.mode",
    "augment.too_small": "augment.crop.too_small",
    **{f"augment.{key}": f"augment.jitter.{key}" for key in ("brightness", "contrast", "saturation")},
    "augment.contrast_pivot": "augment.jitter.pivot",
    "data.format": "data.dataset._target_",
    "data.lists": "data.dataset.lists",
    "data.synthetic": "data.dataset",
    "evaluation.split": "data.report_split (of `bisenet evaluate`: split)",
    "evaluation.max_pixels_per_batch": "max_pixels_per_batch",
}
"""Keys of earlier versions -> what says the same now."""


# ---------------------------------------------------------------- resolvers


def new_run_dir(resume: str | None, name: str) -> str:
    """``${new_run_dir:${resume},${name}}``: the run that is resumed, or a folder that nobody has."""
    if resume is not None:
        if not (Path(resume) / ".hydra" / "config.yaml").is_file():
            raise ValueError(f"resume: got {resume!r}, accepted: the directory of a run, outputs/<name>/<date_time>")
        return resume
    if not re.fullmatch(r"\w[\w+.-]*", name):
        raise ValueError(f"name: got {name!r}, accepted: letters, digits, '_', '+', '-' and '.'")
    folder = new = Path("outputs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    number = 1
    while new.exists():
        number += 1
        new = folder.with_name(f"{folder.name}_{number}")
    return str(new)


def config_subdir(resume: str | None, run_dir: str, mode: RunMode) -> str | None:
    """Hydra's folder within the run. Evaluated before Hydra writes there: what a run has recorded stays as it was."""
    folder = Path(run_dir)
    if (rank := os.environ.get("RANK", "0")) != "0":  # torchrun, started by the user: the other processes of this run
        return f".hydra/rank_{rank}"
    if mode == RunMode.MULTIRUN:  # the folder says which job it is: the same command continues it
        if (folder / "results.json").exists():
            return None
        continued = (folder / "provenance.json").exists()  # written once training can begin
    else:
        continued = resume is not None
        begun = (folder / ".hydra" / "config.yaml").exists() and any(
            path.name != ".hydra" and path.suffix != ".log" for path in folder.iterdir()
        )  # else a mistake was found before anything was written
        if begun and not continued:
            raise ValueError(
                f"hydra.run.dir: got {run_dir}, which holds a run already; accepted: another directory, or to continue "
                f"training resume={run_dir}"
            )
    return f".hydra/resumed_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}" if continued else ".hydra"


def run_tags(seed: int) -> list[str]:
    """``${run_tags:${seed}}``: the seed, and in a sweep every value that is swept; within the 64 characters of W&B."""
    swept = ""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        swept = HydraConfig.get().job.override_dirname
    tags = [f"seed={seed}", *filter(None, re.split(r",(?=[^][]*(?:\[|$))", swept))]
    return list(dict.fromkeys(tag[:64] for tag in tags))


def validation_miou(*, _root_: DictConfig) -> str:
    """``${validation_miou:}``: the score that selects ``best.ckpt``, named after the first protocol."""
    return f"val/{next(iter(_root_.protocol), '')}/miou"


# At import, since the processes of a launcher import this module but do not call the entry.
for resolver in (new_run_dir, config_subdir):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, use_cache=True, replace=True)
OmegaConf.register_new_resolver("run_tags", run_tags, replace=True)
OmegaConf.register_new_resolver("run_name", lambda run_dir: Path(run_dir).name, replace=True)
OmegaConf.register_new_resolver("validation_miou", validation_miou, replace=True)


# ---------------------------------------------------------------- answers


def entry(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate what a command does: compose ``conf/<config_name>.yaml`` with the command line, then call it.

    What the user can mend ends with one line; ``HYDRA_FULL_ERROR=1`` shows where it was raised.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        full = os.environ.get("HYDRA_FULL_ERROR")

        @contextmanager
        def answering() -> Iterator[None]:
            try:
                yield
            except Exception as error:
                if full or not (answer := explain(error, config_name)):
                    raise
                log.debug("ended by", exc_info=True)
                raise SystemExit(
                    f"{answer}\n(HYDRA_FULL_ERROR=1 in the environment shows where this was raised)"
                ) from None

        @functools.wraps(task)
        def job(cfg: DictConfig) -> None:
            # A failure in a multirun is Hydra's to record; else Hydra would print more than the answer.
            with nullcontext() if HydraConfig.get().mode == RunMode.MULTIRUN else answering():
                task(cfg)

        @functools.wraps(task)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
            try:
                with answering():
                    refuse_renamed()
                    hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(job)()
            finally:
                os.environ.pop("HYDRA_FULL_ERROR") if full is None else None

        return main

    return decorate


def refuse_renamed() -> None:
    """Raise a ValueError if the command line has a key of an earlier version."""
    for argument in sys.argv[1:]:
        key = argument.lstrip("+~").partition("=")[0]
        for old, new in RENAMED.items():
            if key == old or key.startswith(f"{old}."):
                raise ValueError(f"{key} has another name now: {new}{key.removeprefix(old)}")


def explain(error: Exception, config_name: str) -> str:
    """One line about what a user can mend; empty for all other errors."""
    mendable = (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError)
    if not isinstance(error, mendable) and type(error).__name__ != "MisconfigurationException":  # Lightning's
        return ""
    cause: BaseException | None = error
    while cause is not None:  # resolvers raise within OmegaConf's errors
        if type(cause) is ValueError:
            return f"ValueError: {cause}"
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if found := re.search(r"Could not override '([^']+)'|full_key: (\S+)|[Cc]ould not find '(\w+/[^']+)'", str(error)):
        key = next(filter(None, found.groups()))
        return f"{lines[0].rstrip('.')}: {nearest(key.lstrip('+~'), config_name)}".rstrip(": ")
    where = getattr(error, "override", None)  # of a parser's error
    return f"{where}: {lines[0]}" if where else lines[0]


def nearest(key: str, config_name: str) -> str:
    """The keys or options that are accepted in place of a misspelt one, and the nearest of them."""
    if "/" in key:
        group, _, name = key.rpartition("/")
        where, accepted = f"options of {group}", sorted(file.stem for file in Path(conf_dir(), group).glob("*.yaml"))
    else:
        GlobalHydra.instance().clear()
        parent, _, name = key.rpartition(".")
        wanted = [
            a for a in sys.argv[1:] if re.fullmatch(r"[\w/]+=\w+", a) and Path(conf_dir(), a.partition("=")[0]).is_dir()
        ]
        try:
            with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
                cfg = hydra.compose(config_name, wanted)
        except HydraException:  # there is another mistake
            return ""
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig):
            return nearest(parent, config_name) if parent else ""
        where, accepted = f"keys of {parent or 'the configuration'}", [str(entry) for entry in node]
    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.35)
    return (f"did you mean {close[0]}? " if close else "") + f"{where}: {', '.join(accepted)}"


def name_changed_presets(cfg: DictConfig) -> None:
    """A protocol is known by its name: where a preset was changed, append to its name what differs.

    ``protocol.ss.scales=[0.5,1]`` is reported as ``ss-scales-0.5-1``.
    """

    def spelled(value: Any) -> str:
        return "-".join(map(spelled, value)) if isinstance(value, list) else str(value).lower()

    named: dict[str, Any] = {}
    protocols: Any = OmegaConf.to_container(cfg.protocol, resolve=False)
    for name, protocol in protocols.items():
        file = Path(conf_dir(), "protocol", f"{name}.yaml")
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
        preset = content.get(name, protocol)
        changed = {key: value for key, value in protocol.items() if preset.get(key) != value}
        named["-".join([str(name), *(f"{key}-{spelled(value)}" for key, value in changed.items())])] = protocol
    with open_dict(cfg):
        cfg.protocol = named


# ---------------------------------------------------------------- commands


@entry("train")
def train_task(cfg: DictConfig) -> None:
    """Train and evaluate a model, or many with -m."""
    if sweep.is_job():
        continued = sweep.job(cfg)
        if continued is None:
            return
        cfg = continued
    elif cfg.resume is not None:
        cfg = resumed(cfg)
    name_changed_presets(cfg)
    processes = launch.processes_here(cfg.trainer.devices)
    if processes > 1:
        if cfg.trainer.num_nodes > 1:
            raise ValueError(
                f"trainer.num_nodes: got {cfg.trainer.num_nodes}, accepted: 1, unless torchrun starts this command on "
                "every node (scripts/README.md)"
            )
        job_logging: Any = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
        launch.run("bisenet.experiment:train", OmegaConf.to_container(cfg, resolve=True), processes, job_logging)
        return
    from bisenet import experiment  # heavy: only once the configuration is composed

    experiment.train(cfg)


def resumed(cfg: DictConfig) -> DictConfig:
    """The stored configuration of the run that ``cfg.resume`` names, to continue it as it was.

    Raises:
        ValueError: an override that could change the result.
    """
    keys = [
        override.key_or_group
        for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    ]
    if refused := sorted({key for key in keys if key != "resume" and not key.startswith(sweep.PRACTICAL)}):
        accepted = ", ".join(sweep.PRACTICAL)
        raise ValueError(f"resume: {', '.join(refused)} may not change; accepted beside resume: {accepted}")
    if Path(cfg.resume).resolve() != Path(cfg.run_dir).resolve():
        raise ValueError(
            f"hydra.run.dir: got {cfg.run_dir}, accepted: {cfg.resume}, where the run that is resumed lies"
        )
    stored = OmegaConf.load(Path(cfg.resume) / ".hydra" / "config.yaml")
    assert isinstance(stored, DictConfig)
    for key in keys:
        OmegaConf.update(stored, key, OmegaConf.select(cfg, key))
    return stored


@entry("evaluate")
def evaluate(cfg: DictConfig) -> None:
    """Evaluate a checkpoint from itself alone."""
    name_changed_presets(cfg)
    from bisenet import experiment

    experiment.evaluate(cfg)


@entry("predict")
def predict(cfg: DictConfig) -> None:
    """Segment images and videos; exit code 1 if an input could not be read."""
    from bisenet.predict import Predictions

    options = {key: cfg[key] for key in ("overlay", "palette", "train_ids", "label_ids", "legend", "alpha", "overwrite",
                                         "max_frames", "max_pixels")}  # fmt: skip
    predictions = Predictions(cfg.input, Path(cfg.output or cfg.run_dir), **options)
    import torch

    from bisenet import checkpoint

    given: Any = None if cfg.data is None else OmegaConf.to_container(cfg.data, resolve=True)
    read = checkpoint.read(cfg.checkpoint, given)
    cfg.data = read.data  # which the protocols refer to
    segmenter = read.segmenter(hydra.utils.instantiate(cfg.protocol, _convert_="all") or None, list(cfg.trust))
    if cfg.accelerator == "gpu" or (cfg.accelerator == "auto" and torch.cuda.is_available()):
        segmenter = segmenter.cuda()
    if predictions.run(segmenter):
        sys.exit(1)


@entry("export")
def export(cfg: DictConfig) -> None:
    """Write a model for other runtimes (ONNX, OpenVINO, ncnn, TensorRT), or as a model folder."""
    from bisenet.export import Export

    options = {key: cfg[key] for key in ("output", "normalization", "dtype", "batch", "size", "least_agreement",
                                         "license", "push")}  # fmt: skip
    exporter = Export(cfg.format, Path(cfg.folder or cfg.run_dir), **options)
    from bisenet import checkpoint, experiment

    experiment.quiet()
    given: Any = None if cfg.data is None else OmegaConf.to_container(cfg.data, resolve=True)
    read = checkpoint.read(cfg.checkpoint, given)
    images = []
    if cfg.dtype == "int8":
        data = experiment.data_of(cfg, read, given)
        images = [image for image, _ in data.examples(data.train_split, cfg.images)]
    exporter.run(read, read.segmenter(None, list(cfg.trust)), read.hyper_parameters or {"data": given}, images)


@entry("serve")
def serve(cfg: DictConfig) -> None:
    """Serve a model over HTTP, with a page to try it in."""
    from bisenet.runtimes import import_extra

    import_extra("litserve", "serve")
    from bisenet import serve as server

    options: Any = OmegaConf.to_container(cfg, resolve=True)
    checkpoint, host, port = (options.pop(key) for key in ("checkpoint", "host", "port"))
    made = server.make_server(checkpoint, **options)
    print(f"http://{host}:{port}/")
    server.serve(made, host, port)


@entry("check_data")
def check_data(cfg: DictConfig) -> None:
    """Look at a data set before training on it; exit code 1 unless it is fit."""
    from bisenet import report
    from bisenet.classes import ClassTable
    from bisenet.data.check import check

    data, run_dir = cfg.data, Path(cfg.run_dir)
    classes, root = ClassTable.load(data.classes), Path(data.root).expanduser()
    splits = list(cfg.splits or dict.fromkeys((data.train_split, data.val_split, data.report_split)))
    dataset = hydra.utils.instantiate(data.dataset, _convert_="all")(root)
    found = {"data": data.name, "root": str(root.resolve()), "configured": {k: list(data[k]) for k in ("mean", "std")}}
    found |= check(dataset, classes, splits, data.train_split, cfg.workers)
    report.write_json(run_dir / "check_data.json", found)
    report.plot_data(found, classes, run_dir / "check_data.png")
    report.show_data(found)
    print(f"{'fit' if found['fit'] else 'NOT fit'} to train on; {run_dir / 'check_data.json'}")
    if not found["fit"]:
        sys.exit(1)


@entry("compare")
def compare(cfg: DictConfig) -> None:
    """Compare groups of runs."""
    from bisenet import compare as comparison

    def listed(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else list(value or [])

    runs, missing = sweep.read_runs(listed(cfg.runs), listed(cfg.by) or None) if cfg.runs else ([], {})
    options: Any = OmegaConf.to_container(cfg, resolve=True)
    keys = ("values", "values_protocol", "metric", "baseline", "difference", "resamples")
    summary = comparison.compare(runs, missing=missing, **{key: options[key] for key in keys})
    comparison.show(summary)
    comparison.write(summary, Path(cfg.run_dir))
    print(f"summary: {cfg.run_dir}/summary.md")


def train() -> None:
    """Train; where it was a multirun, end with the summary of its folder, whatever happened."""
    sweep.run(train_task)


COMMANDS = {"train": train, "evaluate": evaluate, "predict": predict, "export": export, "serve": serve,
            "compare": compare, "check-data": check_data}  # fmt: skip


def main() -> None:
    """``bisenet <command> [Hydra's options] [overrides]``."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        lines = [f"  {name:12}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
        text = "bisenet <command> --help shows groups and options\n" + "\n".join(lines)
        raise SystemExit(text if command in ("-h", "--help") else f"got {command!r}, accepted:\n{text}")
    sys.argv[:2] = [f"bisenet {command}"]
    COMMANDS[command]()


if __name__ == "__main__":
    main()
