"""Sweeps: the jobs of one multirun share a folder, and the same command continues them after any interruption.

::

    outputs/sweeps/<sweep.name>/
      sweep.yaml                      the configuration that all jobs share, and the names of the jobs' folders
      <swept key>=<value>,.../        run directories
      summary.json summary.md summary.png

A job's folder is named after its swept values; all other values are the same in all jobs, and a later command for the
folder may not change them. A Hydra callback prepares the sweep, so that any launcher works. The command itself writes
the summary when it ends, because Hydra 1.3 does not call ``on_multirun_end`` when a job has failed.
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
_HARMLESS = {*PRACTICAL, "resume", "sweep"}  # may differ between two commands for one job, unless swept
_SEEDS = ("seed", "init_seed", "data_seed", "repeat")  # in a job's name even if not swept: more may be added
_LISTS = ("without", "protocol", "callbacks", "logger")  # groups of which several options are chosen at once


class SweepCallback(Callback):
    """Names the folders of a multirun, and logs which job failed and why."""

    folder: ClassVar[Path | None] = None
    """Folder of the multirun that this process has started; None: it has started none."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Fix the sweep's folder and its jobs before any of them runs."""
        try:
            SweepCallback.folder = _begin(config)
        except Exception as error:  # which Hydra would turn into a warning
            raise SystemExit(f"{type(error).__name__}: {error}") from error

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Log the failure of a job at once: Hydra raises only the first failure, after all jobs have ended."""
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            try:
                _ = job_return.return_value
            except Exception as error:
                known = isinstance(error, ValueError | OSError)  # the message is enough, without a traceback
                log.error("job %s failed: %s", config.hydra.job.override_dirname or "run", error, exc_info=not known)


def is_job() -> bool:
    """Whether this process runs a job of a multirun."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def job(cfg: DictConfig) -> DictConfig | None:
    """The configuration of a job of a multirun, set to resume in its folder; None if the job is finished.

    Raises:
        ValueError: ``resume`` names a run, or the folder holds a job that was begun with another configuration.
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
    """A job's folder within its sweep, from Hydra's ``key=value,key=[a,b]``; other overrides give another name.

    ``[a,b]`` of an option group becomes ``a+b``, since brackets mean something in globs. Where other characters were
    replaced, or the name was too long, the name ends with a digest of the overrides.
    """
    lists = rf"(?<![^,])({'|'.join(_LISTS)})=\[([\w.,/-]*)\]"
    plain = re.sub(lists, lambda found: f"{found[1]}={found[2].replace(',', '+') or 'nothing'}", override_dirname)
    name = re.sub(r"[^\w=.,+-]", "-", plain)
    if name != plain or len(name) > 200 or re.search("-[0-9a-f]{8}$", name):  # names in file systems end at 255 bytes
        name = f"{name[:190]}-{sha256(override_dirname.encode()).hexdigest()[:8]}"
    return name or "run"


OmegaConf.register_new_resolver("job_dir", job_dir, use_cache=True, replace=True)


def summarize(folder: Path) -> None:
    """Print the table of a multirun, and write its summary into its folder, replacing an earlier one."""
    from bisenet import compare

    runs, missing = read_runs([str(folder)])
    ablation = any(run.group == {"without": "nothing"} for run in runs)
    summary = compare.compare(runs, missing=missing, baseline=compare.FULL_RECIPE if ablation else None)
    compare.show(summary)
    compare.write(summary, folder)
    log.info("summary: %s", folder / "summary.md")
    stored = _plain(_load(folder / _FILE).config) if (folder / _FILE).exists() else {}
    if node := OmegaConf.select(OmegaConf.create(stored), "logger.wandb"):  # it refers to other keys
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
    """Set the names of the sweep and its jobs in the configuration that Hydra is about to use, and write sweep.yaml.

    Returns:
        The sweep's folder.

    Raises:
        ValueError: a name that cannot be a folder's, or the folder was begun with another configuration.
    """
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
            f"sweep.name={cfg.sweep.name}",  # for all jobs: a name may depend on swept values
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join([*fixed, 'sweep.name'])}]",
        ]
    folder = Path(node.sweep.dir)
    shared = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    begun = (folder / _FILE).exists() and any(folder.glob("*/provenance.json"))  # else no job has trained yet
    if begun:
        _require_same(folder, _load(folder / _FILE).config, shared, {*_HARMLESS, *_SEEDS})
    values = [_values(override) for key, override in overrides.items() if key not in fixed]
    names = [job_dir(",".join(sorted(lines))) for lines in itertools.product(*values)]  # as Hydra's override_dirname
    before = [name for name in _jobs(folder / _FILE) if (folder / name).is_dir()] if begun else []  # no mistyped ones
    content = {"jobs": list(dict.fromkeys([*before, *names])), "config": _plain(shared)}
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{_FILE}.{os.getpid()}"  # several commands may begin one sweep at the same time
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
    """The overrides ``key=value`` that the jobs get from one override, one for each of its values."""
    several = override.is_sweep_override()
    values = override.sweep_string_iterator() if several else [override.get_value_element_as_str()]
    return [f"{override.get_key_element()}={value}" for value in values]


def _jobs(file: Path) -> list[str]:
    """Names of the jobs' folders in a ``sweep.yaml``; empty if there is no such file."""
    return list(_load(file).jobs) if file.exists() else []


def swept(node: Any) -> dict[str, str]:
    """Key -> override of the swept values in a job's ``hydra`` node; empty for a single run."""
    several = "MULTIRUN" in str(node.mode)  # an enumeration, or text when read from a file
    fixed = node.job.config.override_dirname.exclude_keys
    return {_key(override): override for override in node.overrides.task if several and _key(override) not in fixed}


def _require_same(folder: Path, stored: Any, now: DictConfig, ignored: Collection[str]) -> None:
    """Raise a ValueError if two configurations for one folder differ, except in keys that are ignored."""
    if found := differences(_plain(stored), _plain(now), ignored):
        raise ValueError(
            f"{folder} was begun with another configuration:\n{found}\n"
            "The same command continues it; another sweep.name or hydra.run.dir begins anew"
        )


def _plain(cfg: Any) -> Any:
    """Plain containers, in which interpolations stay text."""
    return OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)


def _load(file: Path) -> Any:
    return OmegaConf.load(file)


# ---------------------------------------------------------------- after them


def read_runs(paths: Sequence[str], by: Sequence[str] | None = None) -> "tuple[list[Run], dict[str, str]]":
    """Find training runs, and the group that each belongs to.

    Args:
        paths: run directories, folders that hold some at any depth, and globs of either.
        by: what the runs are grouped by: names of option groups and keys of the configuration. None: the overridden
            keys whose values differ between runs, without seeds and keys that cannot change a result.

    Returns:
        The finished runs, and name -> reason for the runs that are unfinished, damaged, or planned and never begun.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a key of ``by`` that some run lacks, or that holds no single value.
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
                if _load(file).get("model"):  # else it is an evaluation or a comparison
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
    """The configuration, options and overrides that Hydra recorded in ``.hydra`` of a run."""

    def __init__(self, folder: Path) -> None:
        self.config: Any = _load(folder / ".hydra" / "config.yaml")
        self.seeds: tuple[int, int] = (self.config.init_seed, self.config.data_seed)
        node = _load(folder / ".hydra" / "hydra.yaml").hydra
        self.choices, self.swept = dict(node.runtime.choices), swept(node)
        self.overrides = {_key(override): override.partition("=")[2] for override in node.overrides.task}

    def text(self, key: str) -> str:
        """As :meth:`value`; where that is None, the text of the override, else ``nothing``."""
        return self.value(key) or self.overrides.get(key, "nothing")

    def value(self, key: str) -> str | None:
        """The option of a group (several as ``a+b``), or a value of the configuration; None: the key is neither."""
        if key in _LISTS:  # Hydra records the choice of a group only where it is a single option
            chosen = list(self.config.get(key) or re.findall(r"[^][,\s]+", self.overrides.get(key, "")))
            return "+".join(sorted(chosen) if key == "without" else chosen) or "nothing"
        if key in self.choices:
            return self.choices[key] or "nothing"
        value = OmegaConf.select(self.config, key, default=self, throw_on_resolution_failure=False)
        return None if value is self or isinstance(value, DictConfig) else str(value)


def _varied(stored: Sequence[_Stored]) -> list[str]:
    """Overridden keys whose final values differ between runs; without any, ``name`` if the runs' names differ."""
    harmless = _HARMLESS.difference(["data.root"], *(one.swept for one in stored))  # each fold may have its own root
    ignored = {*_SEEDS, *harmless}
    asked = dict.fromkeys(key for one in stored for key in one.overrides if not within(key, ignored))
    varied = [key for key in asked if len({one.text(key) for one in stored}) > 1]
    return varied or (["name"] if len({one.value("name") for one in stored}) > 1 else [])


def _key(override: str) -> str:
    """The key of an override, as ``a.b`` of ``+a.b=1``."""
    return override.lstrip("+~").partition("=")[0]
