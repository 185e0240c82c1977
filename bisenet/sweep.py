"""Sweeps: the jobs of one multirun in one folder, which the same command continues after whatever stopped it.

::

    outputs/sweeps/<sweep.name>/
      sweep.yaml                      what all jobs share, and the folders of the jobs
      <swept key>=<value>,.../        run directories
      summary.json summary.md summary.png

A job is known by the values that are swept; all else is the same in all jobs and may not change while the folder is in
use. What is needed comes in through a Hydra callback, so that any launcher works. The summary is written when the
command ends, however it ends: Hydra 1.3 forgets ``on_multirun_end`` when a job has failed.
"""

import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bisenet import config

if TYPE_CHECKING:
    from bisenet import comparison
    from bisenet.comparison import Run

log = logging.getLogger(__name__)

_FILE = "sweep.yaml"
_SEEDS = ("seed", "init_seed", "data_seed", "repeat")  # a job is always known by them, so that others can be added
_BESIDE = ("resume", "sweep", *config.HARMLESS)  # may differ between two commands for the same sweep


class SweepCallback(Callback):
    """Names the folders of a multirun, and says which job failed and why."""

    folder: ClassVar[Path | None] = None
    """Of the multirun that this process has started."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Fix the sweep's folder and its jobs before any of them runs."""
        try:
            SweepCallback.folder = _begin(config)
        except Exception as error:  # Hydra would make a warning of it and go on
            raise SystemExit(f"{type(error).__name__}: {error}") from error

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Log the failure of a job: Hydra raises the first one only, when all have ended."""
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            try:
                _ = job_return.return_value
            except Exception as error:
                known = isinstance(error, ValueError | OSError)  # says all that there is to say
                log.error("job %s failed: %s", config.hydra.job.override_dirname or "run", error, exc_info=not known)


def run(main: Callable[[], None]) -> None:
    """Call a script's main; where it was a multirun, end with the summary of its folder, whatever happened."""
    try:
        main()
    finally:
        if SweepCallback.folder is not None:
            summarize(SweepCallback.folder)


def summarize(folder: Path) -> None:
    """Show the table of a multirun, and write its summary into the folder, over that of an earlier command."""
    from bisenet import comparison  # SciPy and Matplotlib: not needed by the jobs

    runs, missing = read_runs([str(folder)])
    summary = comparison.compare(runs, missing=missing)
    comparison.show(summary)
    comparison.write(summary, folder)
    log.info("summary: %s", folder / "summary.md")
    if (folder / _FILE).exists():
        node = OmegaConf.select(OmegaConf.create(_plain(_load(folder / _FILE).config)), "logger.wandb")
        if node is not None:
            _log_to_wandb(node, folder, comparison.sections(summary))


def _log_to_wandb(node: DictConfig, folder: Path, sections: "Iterable[comparison.Section]") -> None:
    """Give tables and figure to W&B, as one more run of the jobs' group."""
    node.update(save_dir=str(folder), name="summary", job_type="summary", tags=["summary"])
    logger = config.instantiate("logger.wandb", node)
    for section in sections:
        if section.rows:
            logger.log_table(f"summary/{section.title}", list(section.columns), [list(row) for row in section.rows])
    if (folder / "summary.png").exists():
        logger.log_image("summary/figure", [str(folder / "summary.png")])
    logger.experiment.finish()


def read_runs(paths: Sequence[str], by: Sequence[str] | None = None) -> "tuple[list[Run], dict[str, str]]":
    """The training runs in folders, and which group each belongs to.

    Args:
        paths: run directories, folders that hold some at any depth, and globs of either.
        by: what groups them: names of option groups and keys of the configuration; None: what was overridden and
            differs, but for seeds and what is harmless.

    Returns:
        The finished runs, and name -> what is wrong for those that are not, or were planned and never begun.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a key that no run has, or that holds no single value.
    """
    from bisenet.comparison import Run

    places = [Path(place) for path in paths for place in (sorted(glob.glob(path)) or [path])]
    stored: dict[Path, _Stored] = {}
    damaged: dict[Path, str] = {}
    planned: list[Path] = []
    for place in places:
        for file in sorted(place.rglob(".hydra/config.yaml")):
            folder = file.parents[1]
            try:
                if _load(file).get("model"):  # and no evaluation or comparison
                    stored[folder] = _Stored(folder)
            except (OSError, AttributeError, TypeError, ValueError, YAMLError, OmegaConfBaseException) as error:
                reason = (str(error).splitlines() or [""])[0]
                damaged[folder] = f"its .hydra is incomplete or damaged ({type(error).__name__}: {reason})"
        planned += [file.parent / job for file in sorted(place.rglob(_FILE)) for job in _jobs(file.parent)]
    everything = list(dict.fromkeys([*stored, *damaged, *planned]))
    if not everything:
        raise FileNotFoundError(f"runs: no run in {', '.join(paths)}; accepted: run directories or folders of them")
    root = Path(os.path.commonpath([folder.parent for folder in everything]))
    varied = _varied(list(stored.values()))
    keys = varied if by is None else list(by)
    rest = [key for key in varied if key not in keys]

    runs, missing = [], {}
    for folder in everything:
        name = str(folder.relative_to(root))
        if folder not in stored:
            missing[name] = damaged.get(folder, "not begun")
        elif not (folder / "results.json").exists():
            missing[name] = "begun, not finished; see its train.log"
        elif (results := _results(folder)) is None:
            missing[name] = "its results.json is damaged, or of another version of bisenet"
        else:
            runs.append(
                Run(
                    name=name,
                    folder=folder,
                    arm={key: (stored[folder].text if by is None else stored[folder].value)(key) for key in keys},
                    seeds=stored[folder].seeds,
                    results=results,
                    beside={key: stored[folder].text(key) for key in rest},
                    trained=_trained(stored[folder].config),
                )
            )
    return runs, missing


def _results(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"split", "protocols"} <= found.keys() else None


class _Stored:
    """What Hydra wrote beside a run."""

    def __init__(self, folder: Path) -> None:
        self.config = _load(folder / ".hydra" / "config.yaml")
        self.seeds: tuple[int, int] = (self.config.init_seed, self.config.data_seed)
        self.choices = _load(folder / ".hydra" / "hydra.yaml").hydra.runtime.choices
        lines: list[str] = list(_load(folder / ".hydra" / "overrides.yaml"))
        split = [line.lstrip("+~").partition("=") for line in lines]
        self.overrides = {key: value for key, _, value in split}

    def text(self, key: str) -> str:
        """As :meth:`value`; where there is none, what an override said."""
        try:
            return self.value(key)
        except ValueError:
            return self.overrides.get(key, "nothing")

    def value(self, key: str) -> str:
        """An option, several as ``a+b``, or a value of the configuration, as text.

        Raises:
            ValueError: it is neither.
        """
        if key in ("protocol", "callbacks", "logger"):  # by name, several at once
            return "+".join(self.config.get(key) or ["nothing"])
        if Path(config.conf_dir(), key).is_dir():  # Hydra records the choice of a group, but only if it is a single one
            return config.job_dir(str(self.choices.get(key) or self.overrides.get(key, "nothing")))
        value = OmegaConf.select(self.config, key, default=self)
        if value is self or isinstance(value, DictConfig):
            raise ValueError(f"by: got {key!r}, accepted: an option group or a single value of the configuration")
        return str(value)


def _varied(stored: Sequence[_Stored]) -> list[str]:
    """Keys that some run has overridden and that have different values in the end."""
    keys = dict.fromkeys(key for one in stored for key in one.overrides)
    beside = {*_SEEDS, "sweep.name", *_BESIDE}
    asked = [key for key in keys if key not in beside and key.partition(".")[0] != "logger"]
    varied = [key for key in asked if len({one.text(key) for one in stored}) > 1]
    return varied or (["name"] if len({one.value("name") for one in stored}) > 1 else [])


def _trained(cfg: DictConfig) -> frozenset[tuple[str, str]]:
    """Keys and values that a training depends on, but for its seeds and for switches of what it does not have."""
    beside = {*_SEEDS, *_BESIDE, "name", "logger", "hydra"}
    if not OmegaConf.select(cfg, "model.output_layers"):
        beside.add("optimizer.output_lr_multiplier")
    if {OmegaConf.select(cfg, f"trainer.{key}") for key in ("devices", "num_nodes")} == {1}:
        beside.add("strategy.sync_batchnorm")
    return frozenset((key, repr(value)) for key, value in config.leaves(_plain(cfg)) if not _within(key, beside))


def job(cfg: DictConfig) -> DictConfig | None:
    """The configuration with which a job of a multirun continues in its folder; None: it is finished.

    Raises:
        ValueError: the folder holds a job that was begun with another configuration.
    """
    folder = config.output_dir()
    if cfg.resume is not None:
        raise ValueError(f"resume: got {cfg.resume!r} in a multirun, accepted: its own command, which resumes its jobs")
    _require_same(str(folder), _load(folder / ".hydra" / "config.yaml"), cfg)
    if (folder / "results.json").exists():
        log.info("%s is finished already", folder.name)
        return None
    continued = cfg.copy()
    continued.resume = str(folder)
    return continued


def is_job() -> bool:
    """Whether this runs as a job of a multirun."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _jobs(folder: Path) -> list[str]:
    """Folders of the jobs that the multirun in a folder has planned; empty where there was none."""
    file = folder / _FILE
    return list(_load(file).jobs) if file.exists() else []


def _load(file: Path) -> Any:
    return OmegaConf.load(file)


def _begin(cfg: DictConfig) -> Path:
    """Name folder and jobs in the configuration from which Hydra makes the jobs; record both."""
    hydra = cfg.hydra
    with open_dict(cfg):
        hydra.overrides.task = [_repetitions(override) for override in hydra.overrides.task]
        given = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()] + list(hydra.overrides.task)
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        overrides = {override.key_or_group: override for override in parser.parse_overrides(given)}  # the last counts
        fixed = [key for key, override in overrides.items() if not override.is_sweep_override() and key not in _SEEDS]
        if cfg.sweep.name is None:
            chosen = overrides.get("experiment")
            name = (
                chosen.get_value_element_as_str() if chosen and "experiment" in fixed and chosen.value() else cfg.name
            )
            cfg.sweep.name = config.job_dir(name).replace(",", "+")
        config.typed(cfg.sweep)
        hydra.overrides.hydra += [
            f"sweep.name={cfg.sweep.name}",  # some names depend on what is swept
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join([*fixed, 'sweep.name'])}]",
        ]
    folder = Path(hydra.sweep.dir)
    shared = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    begun = (folder / _FILE).exists() and any(folder.glob("*/provenance.json"))  # else all failed before they trained
    if begun:
        _require_same(str(folder), _load(folder / _FILE).config, shared, beside=(*_BESIDE, *_SEEDS))
    said = {key: _said(override) for key, override in overrides.items()}
    if "without" in said:
        _require_arms(cfg, [lines[:1] if key in _SEEDS else lines for key, lines in said.items()])
    swept = [lines for key, lines in said.items() if key not in fixed]
    names = [config.job_dir(",".join(sorted(job))) for job in itertools.product(*swept)]  # as Hydra's override_dirname
    before = [job for job in _jobs(folder) if (folder / job).is_dir()] if begun else []  # without mistyped ones
    content = {"jobs": list(dict.fromkeys([*before, *names])), "config": _plain(shared)}
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{_FILE}.{os.getpid()}"
    OmegaConf.save(OmegaConf.create(content), draft)
    os.replace(draft, folder / _FILE)
    return folder


def _said(override: Override) -> list[str]:
    """An override as the jobs get it, one for each of its values."""
    key = override.get_key_element()
    if override.is_sweep_override():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={override.get_value_element_as_str()}"]


def _require_arms(cfg: DictConfig, overrides: Sequence[Sequence[str]]) -> None:
    """Compose every arm of an ablation: each must go without what it says, and arms that are the same are named."""
    known: dict[frozenset[tuple[str, str]], str] = {}
    for lines in itertools.product(*overrides):
        composed = GlobalHydra.instance().config_loader().load_sweep_config(cfg, list(lines))
        config.require_off(composed, config.tricks_off(lines))
        arm = ", ".join(line for line, options in zip(lines, overrides, strict=True) if len(options) > 1)
        same = known.setdefault(_trained(composed), arm)
        if same != arm:
            log.warning("%s is the same configuration as %s, and will not be compared with it", arm, same)


def _repetitions(override: str) -> str:
    """``repeat=3`` stands for the repetitions 1, 2 and 3."""
    found = re.fullmatch(r"repeat=(\d+)", override)
    if found and not int(found[1]):
        raise ValueError(f"repeat: got {found[1]}, accepted: an integer of at least 1")
    return f"repeat={','.join(map(str, range(1, int(found[1]) + 1)))}" if found else override


def _require_same(where: str, stored: Any, now: DictConfig, beside: Sequence[str] = _BESIDE) -> None:
    before, after = dict(config.leaves(_plain(stored))), dict(config.leaves(_plain(now)))
    differences = [
        f"{key}: {before.get(key, 'nothing')} there, {after.get(key, 'nothing')} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _within(key, beside)
    ]
    if differences:
        raise ValueError(
            f"{where} was begun with another configuration:\n  " + "\n  ".join(differences) +
            "\nThe same command continues it; sweep.name=<another> begins a new sweep"
        )  # fmt: skip


def _within(key: str, nodes: Iterable[str]) -> bool:
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
