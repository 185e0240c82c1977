"""The command ``bisenet``: Hydra composes the configuration, mistakes get a one-line answer, subcommands do the work.

Every key stands in ``conf/``, so composition finds a misspelt key at once, before torch is imported. A wrong value is
refused by the constructor that takes it.
"""

import atexit
import difflib
import functools
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
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
"""Key of an earlier version -> its replacement."""


# ---------------------------------------------------------------- resolvers


def config_subdir(resume: str | None, run_dir: str) -> str | None:
    """The folder within the run where Hydra records the configuration; None: Hydra records nothing.

    It is chosen before Hydra writes, so that the records of an earlier start of the run are not overwritten.

    Raises:
        ValueError: the directory holds a run, and ``resume`` is not set.
    """
    folder = Path(run_dir)
    if (rank := os.environ.get("RANK", "0")) != "0":  # the user started torchrun, and this is not its first process
        return f".hydra/rank_{rank}"
    begun = (folder / ".hydra" / "config.yaml").exists() and any(
        path.name not in (".hydra", ".lock") and path.suffix != ".log" for path in folder.iterdir()
    )  # a command that was refused leaves only these files
    if begun and resume is None:
        raise ValueError(f"hydra.run.dir: got {run_dir}, which holds a run already; accepted: another directory")
    if (folder / "results.json").exists():
        return None
    continued = begun or resume not in (None, "auto")
    return f".hydra/resumed_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}" if continued else ".hydra"


def run_tags(seed: int) -> list[str]:
    """``${run_tags:${seed}}``: tags for W&B, which are the seed and the job's swept overrides, cut at 64 characters."""
    swept = sweep.swept(HydraConfig.get()).values() if HydraConfig.initialized() else ()
    return list(dict.fromkeys(tag[:64] for tag in (f"seed={seed}", *swept)))


def validation_miou(*, _root_: DictConfig) -> str:
    """``${validation_miou:}``: name of the score that selects ``best.ckpt``, the mIoU of the first protocol."""
    return f"val/{next(iter(_root_.protocol), '')}/miou"


# Registered at import: the processes of a Hydra launcher import this module without calling an entry.
OmegaConf.register_new_resolver("config_subdir", config_subdir, use_cache=True, replace=True)
OmegaConf.register_new_resolver("run_tags", run_tags, replace=True)
OmegaConf.register_new_resolver("run_name", lambda run_dir: Path(run_dir).name, replace=True)
OmegaConf.register_new_resolver("validation_miou", validation_miou, replace=True)


# ---------------------------------------------------------------- a directory for each command


class RunDirectory(Callback):
    """Gives a command a directory of its own before anything is written there, and locks it until the process ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose, make and lock the directory."""
        try:
            _claim(config)
        except Exception as error:
            raise Refused(error) from None


class Refused(BaseException):
    """Carries an error out of a Hydra callback. It is no ``Exception``, which Hydra would turn into a warning."""


def _claim(cfg: DictConfig) -> None:
    """Set ``hydra.run.dir`` to the run that is resumed or to a new directory; the first process locks it."""
    resume, name = cfg.get("resume"), cfg.get("name", "run")
    by_time = "${now" in OmegaConf.to_container(cfg.hydra.run, resolve=False)["dir"]  # type: ignore[index,call-overload]
    if isinstance(name, bool) or not re.fullmatch(r"\w[\w+.-]*", str(name)):  # YAML reads name=on as true
        raise ValueError(f"name: got {name!r}, accepted: letters, digits, '_', '+', '-' and '.'")
    if resume not in (None, "auto"):
        if not (Path(resume) / ".hydra" / "config.yaml").is_file():
            raise ValueError(
                f"resume: got {resume!r}, accepted: the directory of a run (outputs/<name>/<date_time>), auto (the run "
                "in hydra.run.dir, if there is one), or null (a new run)"
            )
        if not by_time and Path(resume).resolve() != Path(cfg.hydra.run.dir).resolve():
            raise ValueError(
                f"hydra.run.dir: got {cfg.hydra.run.dir}, accepted: {resume}, where the run that is resumed lies"
            )
        cfg.hydra.run.dir = resume
    elif by_time:
        folder = Path(cfg.hydra.run.dir)
        for number in itertools.count(2):
            try:
                Path(cfg.hydra.run.dir).mkdir(parents=True)
                break
            except FileExistsError:  # of another command, started in the same second
                cfg.hydra.run.dir = f"{folder}_{number}"
    if os.environ.get("RANK", "0") == "0":
        Path(cfg.hydra.run.dir).mkdir(parents=True, exist_ok=True)
        locked = ExitStack()
        locked.enter_context(launch.alone_in(Path(cfg.hydra.run.dir)))
        atexit.register(locked.close)


# ---------------------------------------------------------------- answers


def entry(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorator of a command: compose ``conf/<config_name>.yaml`` with the command line, then call the function.

    A mistake of the user ends the command with one line; with ``HYDRA_FULL_ERROR=1``, with the traceback.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        full = os.environ.get("HYDRA_FULL_ERROR")

        @contextmanager
        def answering() -> Iterator[None]:
            try:
                yield
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            except Exception as error:
                if full or not (answer := explain(error, config_name)):
                    raise
                log.debug("ended by", exc_info=True)
                raise SystemExit(
                    f"{answer}\n(HYDRA_FULL_ERROR=1 in the environment shows where this was raised)"
                ) from None

        @functools.wraps(task)
        def job(cfg: DictConfig) -> None:
            # In a multirun Hydra records the failure. A single run is answered here, before Hydra can print more.
            with nullcontext() if sweep.is_job() else answering():
                refuse_misplaced(cfg, config_name)
                task(cfg)

        @functools.wraps(task)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
            with answering():
                read_command_line()
                try:
                    hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(job)()
                except Refused as refused:
                    raise refused.args[0] from None

        return main

    return decorate


def read_command_line() -> None:
    """Move Hydra's options in ``sys.argv`` before the overrides, and refuse two mistakes that Hydra answers badly.

    Raises:
        ValueError: a key of an earlier version, or a group that is given something other than options.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 gets ? for what it cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    known, late = get_args_parser().parse_known_args()
    overrides = dict.fromkeys([*known.overrides, *(word for word in late if not word.startswith("-"))])
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word in overrides)
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        for old, new in RENAMED.items():
            if key == old or key.startswith(f"{old}."):
                raise ValueError(f"{key} has another name now: {new}{key.removeprefix(old)}")
        if value and Path(conf_dir(), key).is_dir():
            chosen = OverridesParser.create().parse_override(word).value()
            chosen = chosen if isinstance(chosen, list) else [chosen]
            if not all(isinstance(option, str | dict | Sweep) for option in chosen):
                options = ", ".join(sorted(file.stem for file in Path(conf_dir(), key).glob("*.yaml")))
                raise ValueError(f"{key}: got {value}, accepted: an option, a list of them, or [] for none: {options}")


def refuse_misplaced(cfg: DictConfig, config_name: str) -> None:
    """Raise a ValueError for a configuration file in the wrong package, or a setting of Hydra that runs rely on."""
    node = HydraConfig.get()
    for group in {"experiment", "debug", "without", "precision", "strategy"} & cfg.keys():
        package = "trainer" if group in ("precision", "strategy") else "_global_"
        file = f"{group}/{node.runtime.choices.get(group) or '*'}.yaml"
        raise ValueError(f"{file} changes nothing, accepted: a file with the line '# @package {package}'")
    if cfg.get("run_dir", node.runtime.output_dir) != node.runtime.output_dir:
        raise ValueError(f"run_dir: got {cfg.run_dir}, accepted: hydra.run.dir={cfg.run_dir}, which it follows")
    if node.job.chdir:
        raise ValueError("hydra.job.chdir: got true, accepted: false; paths are relative to where the command starts")
    kept = str(node.output_subdir).startswith(".hydra") or Path(node.runtime.output_dir, ".hydra/config.yaml").exists()
    if config_name == "train" and not kept:
        raise ValueError(f"hydra.output_subdir: got {node.output_subdir}, accepted: .hydra, which resume= reads")


def explain(error: Exception, config_name: str) -> str:
    """One line about a mistake that the user can mend; empty for any other error."""
    lost = re.search(r"DataLoader worker \(pid.*|.*/torch_.*|.*process pool was terminated.*", str(error))
    if lost and isinstance(error, RuntimeError | OSError):
        likely = "most likely memory is full, or /dev/shm (see df -h /dev/shm, docker run --shm-size)"
        return f"{lost[0].strip(' .')}: {likely}; accepted: fewer processes, data.workers=0 (of check-data workers=0)"
    mendable = (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError)
    if not isinstance(error, mendable) and type(error).__name__ != "MisconfigurationException":  # Lightning's
        return ""
    cause: BaseException | None = error
    while cause is not None:  # resolvers raise within OmegaConf's errors
        if type(cause) is ValueError:  # the text of a worker's error begins with its traceback
            return f"ValueError: {str(cause).rpartition('ValueError: ')[2]}".rstrip()
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return f"{type(error).__name__}: {error}"
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(".")
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {first}; accepted: key=value, with special characters in quotes: \"key='a=b'\""
    if several := re.match(r"Multiple values for (\S+)\.", text):
        return f"+{several[1]}: it is chosen already, accepted: {several[1]}=<option>, without the +"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{first}: {nearest(name, f'options of {group}', error.options)}"
    if key := re.search(r"Could not override '([^']+)'|full_key: (\S+)", text):
        return f"{first}: {nearest_key(key[1] or key[2], config_name)}".rstrip(": ")
    return " ".join(text.split())


def nearest(name: str, where: str, accepted: Sequence[str]) -> str:
    """The accepted names for a misspelt one, beginning with the nearest."""
    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.35)
    return (f"did you mean {close[0]}? " if close else "") + f"{where}: {', '.join(accepted)}"


def nearest_key(key: str, config_name: str) -> str:
    """As :func:`nearest`, for a key of the configuration; empty if the options given do not compose either.

    A name that stands elsewhere in the configuration is answered with its whole key: ``lr`` with ``optimizer.lr``.
    """
    options = [a for a in sys.argv[1:] if Path(conf_dir(), a.partition("=")[0]).is_dir()]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
            cfg = hydra.compose(config_name, options)
    except HydraException:
        return ""
    parent, _, name = key.rpartition(".")
    while not isinstance(node := OmegaConf.select(cfg, parent) if parent else cfg, DictConfig):
        parent, _, name = parent.rpartition(".")
    where, here = f"keys of {parent or 'the configuration'}", [str(entry) for entry in node]
    keys = [full for full, _ in launch.leaves(OmegaConf.to_container(cfg, resolve=False))]
    keys.sort(key=lambda full: (full.startswith(f"{key.partition('.')[0]}."), -full.count(".")))  # the best comes last
    elsewhere = {full.rpartition(".")[2]: full for full in keys}
    if name in elsewhere or not difflib.get_close_matches(name, here, cutoff=0.75):
        for close in difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75):
            return f"did you mean {elsewhere[close]}? {where}: {', '.join(here)}"
    return nearest(name, where, here)


def name_changed_presets(cfg: DictConfig) -> None:
    """Append the changes of a protocol preset to its name, since results are reported under the name.

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
        node, preset = (one if isinstance(one, dict) else {} for one in (protocol, preset))
        changed = {key: value for key, value in node.items() if preset.get(key) != value}
        named["-".join([str(name), *(f"{key}-{spelled(value)}" for key, value in changed.items())])] = protocol
    with open_dict(cfg):
        cfg.protocol = named


# ---------------------------------------------------------------- commands


@entry("train")
def train_task(cfg: DictConfig) -> None:
    """Train and evaluate a model, or many with -m."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the user started torchrun
        launch.end_with(os.getppid())
    try:
        with launch.alone_in(Path(cfg.run_dir)) if sweep.is_job() else nullcontext():  # RunDirectory locks single runs
            _train(cfg)
    except launch.InUse as error:
        log.info("%s: the job is left to it", error)


def _train(cfg: DictConfig) -> None:
    """Check what a run or job that is continued may change, then train in this process or in one for each device."""
    if sweep.is_job():
        continued = sweep.job(cfg)
        if continued is None:
            return
        cfg = continued
    elif cfg.resume not in (None, "auto"):
        cfg = resumed(cfg)
    elif os.environ.get("RANK", "0") == "0":
        sweep.require_own_configuration(cfg)
    name_changed_presets(cfg)
    processes = launch.processes_here(cfg.trainer.devices, cfg.trainer.accelerator)
    if processes > 1 and cfg.trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes: got {cfg.trainer.num_nodes}, accepted: 1, unless torchrun starts this command on "
            "every node (scripts/README.md)"
        )
    try:
        if processes > 1:
            job_logging: Any = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
            launch.run("bisenet.experiment:train", OmegaConf.to_container(cfg, resolve=True), processes, job_logging)
        else:
            from bisenet import experiment  # imports torch: only once the configuration is composed

            experiment.train(cfg)
    except (KeyboardInterrupt, SystemExit) as end:
        how = "the same command" if sweep.is_job() else f"bisenet train resume={cfg.run_dir}"
        log.warning("ended before it was finished; to continue: %s", how)
        raise SystemExit(130 if isinstance(end, KeyboardInterrupt) else end.code) from None


def resumed(cfg: DictConfig) -> DictConfig:
    """The stored configuration of the run that ``cfg.resume`` names, with the overrides of this command.

    Raises:
        ValueError: an override that could change the result, or a stored configuration that names foreign code.
    """
    keys = [
        override.key_or_group
        for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    ]
    if refused := sorted({key for key in keys if key != "resume" and not key.startswith(launch.PRACTICAL)}):
        longer = f". {launch.LONGER}" if "trainer.max_steps" in refused else ""
        accepted = ", ".join(launch.PRACTICAL)
        raise ValueError(f"resume: {', '.join(refused)} may not change; accepted beside resume: {accepted}{longer}")
    stored = OmegaConf.merge({"channels_last": "auto"}, OmegaConf.load(Path(cfg.resume) / ".hydra" / "config.yaml"))
    assert isinstance(stored, DictConfig)
    from bisenet import checkpoint

    checkpoint.require_known(OmegaConf.to_container(stored), list(cfg.trust))
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
    cfg.data = read.data  # the protocols refer to it
    segmenter = read.segmenter(hydra.utils.instantiate(cfg.protocol, _convert_="all") or None, list(cfg.trust))
    if cfg.accelerator == "gpu" or (cfg.accelerator == "auto" and torch.cuda.is_available()):
        segmenter = segmenter.cuda()
    predictions.folder.mkdir(parents=True, exist_ok=True)
    with launch.alone_in(predictions.folder) if cfg.output else nullcontext():  # the run directory is locked already
        unusable = predictions.run(segmenter)
    if unusable:
        sys.exit(1)


@entry("export")
def export(cfg: DictConfig) -> None:
    """Write a model for other runtimes (ONNX, OpenVINO, ncnn, TensorRT), or as a model folder."""
    from bisenet.export import Export

    keys = ("output", "normalization", "dtype", "batch", "size", "least_agreement", "license")
    options = {key: cfg[key] for key in keys}
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
    _, checkpoint, host, port = (options.pop(key) for key in ("run_dir", "checkpoint", "host", "port"))
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
    found |= check(dataset, classes, splits, data.train_split, cfg.workers, data.get("exif"))
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
    keys = ("values", "values_protocol", "metric", "baseline", "difference")
    summary = comparison.compare(runs, missing=missing, **{key: options[key] for key in keys})
    comparison.show(summary)
    comparison.write(summary, Path(cfg.run_dir))
    print(f"summary: {cfg.run_dir}/summary.md")


@entry("benchmark")
def benchmark(cfg: DictConfig) -> None:
    """Measure size, speed and memory of models."""
    import torch

    import bisenet
    from bisenet import benchmark as measuring

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    options: Any = OmegaConf.to_container(cfg, resolve=True)
    models: dict[str, Any] = {}
    for name in options["models"]:
        if Path(conf_dir(), "model", f"{name}.yaml").is_file():
            node = hydra.compose("train", [f"model={name}"]).model.network
            models[name] = hydra.utils.instantiate(node, n_classes=cfg.n_classes, _convert_="all"), None
        else:
            file = Path(name, "results.json")
            protocols = json.loads(file.read_text())["protocols"] if file.is_file() else {}
            models[name] = bisenet.load(name).network, next((p["miou"] for p in protocols.values()), None)
    on_gpu = cfg.accelerator == "gpu" or (cfg.accelerator == "auto" and torch.cuda.is_available())
    keys = ("sizes", "batches", "precisions", "runtimes", "processing", "warmup", "runs")
    found = measuring.benchmark(models, device="cuda" if on_gpu else "cpu", **{key: options[key] for key in keys})
    measuring.write(found, Path(cfg.run_dir))


def train() -> None:
    """Train and evaluate a model, or many with -m, which ends with their summary."""
    try:
        train_task()
    finally:
        if sweep.SweepCallback.folder is not None:
            sweep.summarize(sweep.SweepCallback.folder)


COMMANDS = {"train": train, "evaluate": evaluate, "predict": predict, "export": export, "serve": serve,
            "compare": compare, "check-data": check_data, "benchmark": benchmark}  # fmt: skip


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
    from bisenet import cli  # so that Hydra's callbacks come from the same module, not from a second copy of it

    cli.main()
