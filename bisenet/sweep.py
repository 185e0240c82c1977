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
import logging
import os
import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hydra
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

from bisenet.launch import PRACTICAL, differences, read_results, within

if TYPE_CHECKING:
    from bisenet.compare import Run  # with SciPy and Matplotlib, which jobs do not need

log = logging.getLogger(__name__)

_FILE = "sweep.yaml"
_HARMLESS = {*PRACTICAL, "resume", "sweep"}  # what may differ between two commands for one job, unless it is swept
_SEEDS = ("seed", "init_seed", "data_seed", "repeat")  # a job is always known by them, so that others can be added
_LISTS = ("without", "protocol", "callbacks", "logger")  # option groups of which several are chosen at once


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


def is_job() -> bool:
    """Whether this runs as a job of a multirun."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def job(cfg: DictConfig) -> DictConfig | None:
    """The configuration with which a job of a multirun continues in its folder; None: it is finished.

    Raises:
        ValueError: the folder holds a job that was begun with another configuration.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume not in (None, "auto"):
        raise ValueError(f"resume: got {cfg.resume!r} in a multirun, accepted: its own command, which resumes its jobs")
    require_own_configuration(cfg)
    if read_results(folder) is not None:
        log.info("%s is finished already", folder.name)
        return None
    cfg.resume = str(folder)
    return cfg


def require_own_configuration(cfg: DictConfig) -> None:
    """Raise a ValueError if the directory of this command holds a run that was begun with another configuration."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    _require_same(folder, _load(folder / ".hydra" / "config.yaml"), cfg, _HARMLESS - swept(HydraConfig.get()).keys())


def job_dir(override_dirname: str) -> str:
    """Folder of a job within its sweep, from Hydra's ``key=value,key=[a,b]``; another one for other overrides.

    Lists of options lose their brackets, which globs read. Where other characters had to go, or the name was too long,
    a digest keeps names apart.
    """
    lists = rf"(?<![^,])({'|'.join(_LISTS)})=\[([\w.,/-]*)\]"
    plain = re.sub(lists, lambda found: f"{found[1]}={found[2].replace(',', '+') or 'nothing'}", override_dirname)
    name = re.sub(r"[^\w=.,+-]", "-", plain)
    if name != plain or len(name) > 200 or re.search("-[0-9a-f]{8}$", name):  # file systems end at 255
        name = f"{name[:190]}-{sha256(override_dirname.encode()).hexdigest()[:8]}"
    return name or "run"


OmegaConf.register_new_resolver("job_dir", job_dir, use_cache=True, replace=True)


def summarize(folder: Path) -> None:
    """Show the table of a multirun, and write its summary into the folder, over that of an earlier command."""
    from bisenet import compare

    runs, missing = read_runs([str(folder)])
    ablation = any(run.group == {"without": "nothing"} for run in runs)
    summary = compare.compare(runs, missing=missing, baseline=compare.FULL_RECIPE if ablation else None)
    compare.show(summary)
    compare.write(summary, folder)
    log.info("summary: %s", folder / "summary.md")
    stored = _plain(_load(folder / _FILE).config) if (folder / _FILE).exists() else {}
    if node := OmegaConf.select(OmegaConf.create(stored), "logger.wandb"):  # which interpolates into the whole
        node.update(save_dir=str(folder), name="summary", job_type="summary", tags=["summary"])
        logger = hydra.utils.instantiate(node, _convert_="all")
        for section in compare.sections(summary):
            if section.rows:
                logger.log_table(f"summary/{section.title}", section.columns, section.rows)
        if (folder / "summary.png").exists():
            logger.log_image("summary/figure", [str(folder / "summary.png")])
        logger.experiment.finish()


# ---------------------------------------------------------------- before the jobs


def _begin(cfg: DictConfig) -> Path:
    """Name folder and jobs in the configuration from which Hydra makes the jobs; record both."""
    node = cfg.hydra
    with open_dict(cfg):
        node.overrides.task = [_repetitions(override) for override in node.overrides.task]
        given = [f"{key}={value}" for key, value in (node.sweeper.params or {}).items()] + list(node.overrides.task)
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        overrides = {override.key_or_group: override for override in parser.parse_overrides(given)}  # the last counts
        fixed = [key for key, override in overrides.items() if not override.is_sweep_override() and key not in _SEEDS]
        if cfg.sweep.name is None:
            chosen = overrides["experiment"].get_value_element_as_str() if "experiment" in fixed else cfg.name
            cfg.sweep.name = job_dir(chosen.strip("[]").replace(",", "+"))
        if not (subdir := _plain(node.sweep)["subdir"]).startswith("${job_dir:"):
            raise ValueError(f"hydra.sweep.subdir: got {subdir!r}, accepted: none; jobs are known by their folders")
        if not re.fullmatch(r"\w[\w.,=+-]*", cfg.sweep.name):
            raise ValueError(f"sweep.name: got {cfg.sweep.name!r}, accepted: letters, digits and . , = + - _")
        node.overrides.hydra += [
            f"sweep.name={cfg.sweep.name}",  # some names depend on what is swept
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join([*fixed, 'sweep.name'])}]",
        ]
    folder = Path(node.sweep.dir)
    shared = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    begun = (folder / _FILE).exists() and any(folder.glob("*/provenance.json"))  # else all failed before they trained
    if begun:
        _require_same(folder, _load(folder / _FILE).config, shared, {*_HARMLESS, *_SEEDS})
    values = [_values(override) for key, override in overrides.items() if key not in fixed]
    names = [job_dir(",".join(sorted(lines))) for lines in itertools.product(*values)]  # as Hydra's override_dirname
    before = [name for name in _jobs(folder / _FILE) if (folder / name).is_dir()] if begun else []  # no mistyped ones
    content = {"jobs": list(dict.fromkeys([*before, *names])), "config": _plain(shared)}
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{_FILE}.{os.getpid()}"
    OmegaConf.save(OmegaConf.create(content), draft)
    os.replace(draft, folder / _FILE)
    return folder


def _repetitions(override: str) -> str:
    """``repeat=3`` stands for the repetitions 1, 2 and 3."""
    found = re.fullmatch(r"repeat=(\d+)", override)
    if found and not int(found[1]):
        raise ValueError(f"repeat: got {found[1]}, accepted: an integer of at least 1")
    return f"repeat=range(1,{int(found[1]) + 1})" if found else override


def _values(override: Override) -> list[str]:
    """An override as the jobs get it, one for each of its values."""
    several = override.is_sweep_override()
    values = override.sweep_string_iterator() if several else [override.get_value_element_as_str()]
    return [f"{override.get_key_element()}={value}" for value in values]


def _jobs(file: Path) -> list[str]:
    """Folders of the jobs that a multirun has planned; empty where there was none."""
    return list(_load(file).jobs) if file.exists() else []


def swept(node: Any) -> dict[str, str]:
    """The overrides that a job is known by, key -> override, from its ``hydra`` node; of a single run: none."""
    several = "MULTIRUN" in str(node.mode)  # an enumeration, or as text in a file
    fixed = node.job.config.override_dirname.exclude_keys
    return {_key(override): override for override in node.overrides.task if several and _key(override) not in fixed}


def _require_same(folder: Path, stored: Any, now: DictConfig, ignored: Collection[str]) -> None:
    if found := differences(_plain(stored), _plain(now), ignored):
        raise ValueError(
            f"{folder} was begun with another configuration:\n{found}\n"
            "The same command continues it; another sweep.name or hydra.run.dir begins anew"
        )


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)


def _load(file: Path) -> Any:
    return OmegaConf.load(file)


# ---------------------------------------------------------------- after them


def read_runs(paths: Sequence[str], by: Sequence[str] | None = None) -> "tuple[list[Run], dict[str, str]]":
    """The training runs in folders, and which group each belongs to.

    Args:
        paths: run directories, folders that hold some at any depth, and globs of either.
        by: what groups them: names of option groups and keys of the configuration; None: what was overridden and
            differs, but for seeds and what cannot change a result.

    Returns:
        The finished runs, and name -> what is wrong for those that are not, or were planned and never begun.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a key that no run has, or that holds no single value.
    """
    from bisenet.compare import Run

    if not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"runs: got {paths}, accepted: run directories, folders of them and globs of either")
    stored: dict[Path, _Stored] = {}
    damaged: dict[Path, str] = {}
    planned: list[Path] = []
    for place in [Path(place) for path in paths for place in (sorted(glob.glob(path)) or [path])]:
        for file in sorted(place.rglob(".hydra/config.yaml")):
            folder = file.parents[1]
            try:
                if _load(file).get("model"):  # and no evaluation or comparison
                    stored[folder] = _Stored(folder)
            except (OSError, AttributeError, TypeError, ValueError, YAMLError, OmegaConfBaseException) as error:
                reason = (str(error).splitlines() or [""])[0]
                damaged[folder] = f"its .hydra is incomplete or damaged ({type(error).__name__}: {reason})"
        planned += [file.parent / name for file in sorted(place.rglob(_FILE)) for name in _jobs(file)]
    everything = list(dict.fromkeys([*stored, *damaged, *planned]))
    if not everything:
        raise FileNotFoundError(f"runs: no run in {', '.join(paths)}; accepted: run directories or folders of them")
    root = Path(os.path.commonpath([folder.parent for folder in everything]))
    varied = _varied(list(stored.values()))
    keys = varied if by is None else list(by)
    if unknown := [key for key in by or () if any(found.value(key) is None for found in stored.values())]:
        accepted = "option groups and single values of the configuration"
        raise ValueError(f"by: got {unknown[0]!r}, accepted: {accepted}")

    runs, missing = [], {}
    for folder in everything:
        name = str(folder.relative_to(root))
        if folder not in stored:
            missing[name] = damaged.get(folder, "not begun")
        elif not (folder / "results.json").exists():
            missing[name] = "begun, not finished; see its train.log"
        elif (results := read_results(folder)) is None:
            missing[name] = "its results.json is damaged, or of another version of bisenet"
        else:
            found = stored[folder]
            group = {key: found.text(key) for key in keys}
            ungrouped = {key: found.text(key) for key in varied if key not in keys}
            runs.append(Run(name, folder, group, found.seeds, results, ungrouped))
    return runs, missing


class _Stored:
    """What Hydra wrote beside a run."""

    def __init__(self, folder: Path) -> None:
        self.config: Any = _load(folder / ".hydra" / "config.yaml")
        self.seeds: tuple[int, int] = (self.config.init_seed, self.config.data_seed)
        node = _load(folder / ".hydra" / "hydra.yaml").hydra
        self.choices, self.swept = dict(node.runtime.choices), swept(node)
        self.overrides = {_key(override): override.partition("=")[2] for override in node.overrides.task}

    def text(self, key: str) -> str:
        """As :meth:`value`; where there is none, what an override said."""
        return self.value(key) or self.overrides.get(key, "nothing")

    def value(self, key: str) -> str | None:
        """An option, several as ``a+b``, or a value of the configuration, as text; None: it is neither."""
        if key in _LISTS:  # Hydra records the choice of a group only where it is a single one
            chosen = list(self.config.get(key) or re.findall(r"[^][,\s]+", self.overrides.get(key, "")))
            return "+".join(sorted(chosen) if key == "without" else chosen) or "nothing"
        if key in self.choices:
            return self.choices[key] or "nothing"
        value = OmegaConf.select(self.config, key, default=self, throw_on_resolution_failure=False)
        return None if value is self or isinstance(value, DictConfig) else str(value)


def _varied(stored: Sequence[_Stored]) -> list[str]:
    """Keys that some run has overridden and that have different values in the end."""
    ignored = {*_SEEDS, *_HARMLESS.difference(["data.root"], *(one.swept for one in stored))}  # folds may lie apart
    asked = dict.fromkeys(key for one in stored for key in one.overrides if not within(key, ignored))
    varied = [key for key in asked if len({one.text(key) for one in stored}) > 1]
    return varied or (["name"] if len({one.value("name") for one in stored}) > 1 else [])


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
