"""Groups of runs side by side: what each scored, how far they differ, and whether that means anything.

:func:`compare` makes plain data of it, which :func:`show` and :func:`write` put before people. Scores are percentages,
differences percentage points.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bisenet import config, report, statistics
from bisenet.statistics import ALPHA, CONFIDENCE, POWER, Interval

_TRICKS = "without"  # the option group that switches tricks off
_NOT_COUNTED = frozenset({"sync_bn"})  # among them: it acts on several GPUs only, and no recipe is "no tricks" by it
_PIPE_WIDTH = 200  # columns of tables that go to a file or another program


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str
    """Unique among those that are compared."""
    folder: Path
    arm: dict[str, str]
    """Key -> value of what groups the runs."""
    seeds: tuple[int, int]
    """Of initialisation and data."""
    results: dict[str, Any]
    """What ``results.json`` holds."""
    beside: dict[str, str] = field(default_factory=dict)
    """Key -> value of what differs between the runs and does not group them."""
    trained: frozenset[tuple[str, str]] | None = None
    """All keys and values that the training depends on, but for seeds; None: unknown."""

    @property
    def unit(self) -> Any:
        """Runs of a group that have this in common are repetitions of one experiment with one seed."""
        return self.seeds, *self.beside.items()


@dataclass
class _Group:
    """Runs of one arm under one protocol; published scores have no runs behind them."""

    arm: dict[str, str]
    scores: dict[str, float] = field(default_factory=dict)
    by_seed: dict[Any, list[float]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    population: dict[str, Any] = field(default_factory=dict)
    """What was scored, as :func:`_population` says; empty for published scores."""

    def add(self, name: str, score: float, unit: Any, run: Run | None = None) -> None:
        self.scores[name] = score
        self.by_seed.setdefault(unit, []).append(score)
        self.runs += [] if run is None else [run]

    @property
    def values(self) -> list[float]:
        """One score for each seed; repetitions of a seed are no further evidence and are averaged."""
        return [float(np.mean(scores)) for scores in self.by_seed.values()]

    @property
    def independent(self) -> int:
        """As how many independent scores :attr:`values` count."""
        return _independent(self.by_seed) if self.runs else len(self.by_seed)


def compare(
    runs: Sequence[Run],
    *,
    missing: Mapping[str, str] | None = None,
    values: Mapping[str, Sequence[float]] | None = None,
    values_protocol: str = "ss",
    metric: str = "miou",
    baseline: str | None = None,
    difference: float = 0.5,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Group runs by arm and compare the groups under every protocol, and the protocols within the groups.

    Args:
        runs: finished runs.
        missing: run -> what is wrong with it, to be reported.
        values: group -> published scores in percent, one for each seed.
        values_protocol: protocol of the published scores.
        metric: key of a protocol's scores in ``results.json``; with dots into what it holds.
        baseline: group that the others are compared with; None: all pairs, or for ablations of tricks all pairs that
            differ in a single trick. Never groups that were scored on different splits, images or classes or by
            different definitions of a protocol, nor arms whose tricks are not in their recipe.
        difference: for which the seeds needed are stated.
        resamples: bootstrap samples of the images.

    Returns:
        Plain data, ready for JSON; the same for the same runs.

    Raises:
        ValueError: runs that cannot be compared, or an unknown metric or baseline.
    """
    missing = dict(missing or {})
    every = _every_trick(runs)
    protocols: dict[str, dict[str, _Group]] = {}
    for run in runs:
        for protocol, scores in run.results["protocols"].items():
            score = _select(scores, metric, f"{run.name}, {protocol}")
            if score is None:
                missing[f"{run.name}, {protocol}"] = f"{metric} is not defined"
                continue
            population = _population(run, protocol)
            group = protocols.setdefault(protocol, {}).setdefault(
                label := _label(run.arm, every), _Group(run.arm, population=population)
            )
            if apart := _apart(group.population, population):
                raise ValueError(
                    f"runs: {group.runs[0].name} and {run.name} of the group {label!r} were scored {apart} "
                    f"under {protocol}; accepted: runs of one data set and one definition in a group, as with by=data"
                )
            group.add(run.name, 100 * score, run.unit, run)
    for name, published in (values or {}).items():
        groups = protocols.setdefault(values_protocol, {})
        if name in groups:
            raise ValueError(f"values: got {name!r}, accepted: a name that no group of runs has")
        for seed, score in enumerate(published, 1):
            groups.setdefault(name, _Group({"values": name})).add(str(seed), float(score), seed)

    protocols = {protocol: _in_order(groups) for protocol, groups in protocols.items()}
    known = list(dict.fromkeys(name for groups in protocols.values() for name in groups))
    if baseline is not None and baseline not in known:
        raise ValueError(f"baseline: got {baseline!r}, accepted: {', '.join(known)}")
    splits = {run.results["split"] for run in runs}
    counts = _Counts(enabled=metric == "miou", resamples=resamples)
    notes = dict.fromkeys(note for groups in protocols.values() for note in _cautions(groups))
    return {
        "metric": metric,
        "split": splits.pop() if len(splits) == 1 else None,
        "confidence": CONFIDENCE,
        "difference": difference,
        "missing": missing,
        "notes": list(notes),
        "protocols": {
            protocol: {
                "groups": {name: _describe(group) for name, group in groups.items()},
                "comparisons": _comparisons(groups, baseline, every, difference, counts.between_groups(protocol)),
            }
            for protocol, groups in protocols.items()
        },
        "within_runs": _between_protocols(protocols, counts),
    }


def _population(run: Run, protocol: str) -> dict[str, Any]:
    """What was scored, and how; by what a difference is called."""
    scores = run.results["protocols"][protocol]
    pixels = {name: entry.get("pixels") for name, entry in scores["classes"].items()}
    return {
        "on other splits": run.results["split"],
        "by other definitions": scores.get("definition"),
        "on other images or classes": (scores.get("n_images"), pixels),
    }


def _apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How two populations differ; empty where they are comparable."""
    return next((name for name in first if name in second and first[name] != second[name]), "")


def _cautions(groups: Mapping[str, _Group]) -> Iterator[str]:
    """What a reader of the table must know about its groups."""
    for name, group in groups.items():
        for key in group.runs[0].beside if group.runs else ():
            values = sorted({run.beside[key] for run in group.runs})
            if len(values) > 1:
                yield f"{name}: its runs also differ in {key} ({', '.join(values)}): their spread is not of seeds alone"
        if group.independent < len(group.by_seed):
            yield (
                f"{name}: its {len(group.by_seed)} pairs of init_seed and data_seed share seeds and count as "
                f"{group.independent} (n), which errs on the safe side"
            )
    for first, second in combinations(groups, 2):
        if apart := _apart(groups[first].population, groups[second].population):
            yield f"{first} and {second} are not compared: they were scored {apart}"
        if _same_training(groups[first], groups[second]):
            tricks = sorted(_without(groups[first].arm) ^ _without(groups[second].arm))
            yield f"{'+'.join(tricks)}: not in this recipe (same configuration), not compared: {first} and {second}"


def _same_training(first: _Group, second: _Group) -> bool:
    """Whether two arms that go without different tricks are one configuration: their recipe does not have these."""
    trained = [{run.trained for run in group.runs} for group in (first, second)]
    known = all(trained) and None not in trained[0] | trained[1]
    return known and _TRICKS in first.arm and _TRICKS in second.arm and trained[0] == trained[1]


def _independent(units: Collection[Any]) -> int:
    """Number of independent scores among those of some :attr:`Run.unit`.

    Where the seeds of initialisation and of data are varied apart and combined, scores that share one of them are no
    independent draws. The number of values of that which has fewer of them is a safe count.
    """
    levels = [{(seeds[source], *beside) for seeds, *beside in units} for source in (0, 1)]
    varied = [
        len(found) for source, found in enumerate(levels) if len({seeds[source] for seeds, *_ in units}) > 1
    ]  # fmt: skip
    return min([len(units), *varied])


def _select(scores: Any, metric: str, where: str) -> float | None:
    for key in metric.split("."):
        if key == "definition":
            raise ValueError(f"metric: got {metric!r}, accepted: the key of a score, not of the protocol's definition")
        if not isinstance(scores, dict) or key not in scores:
            raise ValueError(f"metric: got {metric!r}, which {where} does not have")
        scores = scores[key]
    if metric.endswith("seconds") or not (scores is None or (isinstance(scores, float) and 0 <= scores <= 1)):
        raise ValueError(f"metric: got {metric!r}, accepted: the key of a single score in [0, 1]")
    return scores


def _every_trick(runs: Sequence[Run]) -> frozenset[str]:
    """The training tricks there are: the options, and what else any of the runs goes without."""
    options = (file.stem for file in Path(config.conf_dir(), _TRICKS).glob("*.yaml"))
    return frozenset(options).union(*(_without(run.arm) for run in runs)) - _NOT_COUNTED


def _label(arm: Mapping[str, str], every: frozenset[str]) -> str:
    """Name of a group; ``every`` trick there is."""
    named = dict(arm)
    if _TRICKS in arm:
        without = _without(arm)
        only = every - without
        named[_TRICKS] = (
            "full recipe" if not without
            else "no tricks" if without == every
            else f"only {next(iter(only))}" if len(only) == 1 and without < every
            else f"without {'+'.join(sorted(without))}"
        )  # fmt: skip
    if len(named) == 1:
        return next(iter(named.values()))
    return ", ".join(value if key == _TRICKS else f"{key}={value}" for key, value in named.items()) or "all runs"


def _in_order(groups: Mapping[str, _Group]) -> dict[str, _Group]:
    """As they came, but arms of tricks from the full recipe to none."""
    rests = [_rest(group.arm) for group in groups.values()]
    order = {name: (rests.index(_rest(group.arm)), len(_without(group.arm))) for name, group in groups.items()}
    return dict(sorted(groups.items(), key=lambda item: order[item[0]]))


def _describe(group: _Group) -> dict[str, Any]:
    variance = statistics.split_variance(list(group.by_seed.values()))
    return {
        "runs": group.scores,
        **asdict(statistics.summarize(group.values, group.independent)),
        "variance": None if variance is None else asdict(variance),
    }


# ---------------------------------------------------------------- differences


def _comparisons(
    groups: Mapping[str, _Group],
    baseline: str | None,
    every: frozenset[str],
    needed_for: float,
    over_images: "Callable[[_Group, _Group], Interval | None]",
) -> list[dict[str, Any]]:
    found = []
    for first, second, trick in _pairs(groups, baseline, every):
        one, other = groups[first], groups[second]
        if _apart(one.population, other.population) or _same_training(one, other):
            continue
        a, b, n = one.values, other.values, (one.independent, other.independent)
        entry = {"first": first, "second": second, **trick, "n": list(n)}
        test = statistics.welch(a, b, n) if min(n) > 1 else None
        if test is not None:
            sds = float(np.std(a, ddof=1)), float(np.std(b, ddof=1))
            entry |= _interval(test.difference) | {"p": test.p, "effect_size": test.effect_size}
            entry |= {"seeds_needed": statistics.seeds_needed(needed_for, sds)}
        else:
            entry |= {"difference": float(np.mean(a) - np.mean(b)), "low": None, "high": None, "p": None}
            entry |= {"effect_size": None, "seeds_needed": None}
        images = over_images(one, other)
        found.append(entry | {"images": None if images is None else _interval(images)})
    tests = _correct(found)
    for entry in found:
        entry["verdict"] = _verdict(entry, needed_for, tests)
    if any("trick" in entry for entry in found):
        found.sort(key=lambda entry: -entry["difference"])  # a ranking
    return found


def _pairs(
    groups: Mapping[str, _Group], baseline: str | None, every: frozenset[str]
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Names of two groups, and what the pair says about a trick: the first group has it."""
    if baseline is not None:
        yield from ((name, baseline, {}) for name in groups if name != baseline and baseline in groups)
        return
    without = {name: _without(group.arm) for name, group in groups.items() if _TRICKS in group.arm}
    for first, second in combinations(groups, 2):
        if first not in without or second not in without:
            yield first, second, {}
        elif _rest(groups[first].arm) == _rest(groups[second].arm):
            with_it, without_it = sorted((first, second), key=lambda name: len(without[name]))
            switched = without[without_it] - without[with_it]
            if len(switched) == 1 and without[with_it] <= without[without_it]:
                added, removed = without[without_it] == every, not without[with_it]
                context = "leave one out" if removed else "add one in" if added else "in between"
                yield with_it, without_it, {"trick": next(iter(switched)), "context": context}


def _without(arm: Mapping[str, str]) -> frozenset[str]:
    return frozenset(arm.get(_TRICKS, "nothing").split("+")) - {"nothing"}


def _rest(arm: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in arm.items() if key != _TRICKS}


def _between_protocols(protocols: Mapping[str, Mapping[str, _Group]], counts: "_Counts") -> list[dict[str, Any]]:
    """What evaluation alone changes: every protocol against the first one, run by run; corrected as one family."""
    found = list(_gains(protocols, counts)) if protocols else []
    _correct(found)
    return found


def _correct(entries: Sequence[dict[str, Any]]) -> int:
    """Set ``p_holm`` of entries, a family of tests; return how many have a test."""
    tested = [entry for entry in entries if entry["p"] is not None]
    corrected = statistics.holm([entry["p"] for entry in tested])
    for entry in entries:
        entry["p_holm"] = None
    for entry, p in zip(tested, corrected, strict=True):
        entry["p_holm"] = p
    return len(tested)


def _gains(protocols: Mapping[str, Mapping[str, _Group]], counts: "_Counts") -> Iterator[dict[str, Any]]:
    first, *others = protocols
    for protocol in others:
        for name, group in protocols[protocol].items():
            base = protocols[first].get(name)
            shared = [run for run in group.runs if base is not None and run.name in base.scores]
            if base is None or not shared:
                continue
            by_seed: dict[Any, list[float]] = {}
            for run in shared:
                by_seed.setdefault(run.unit, []).append(group.scores[run.name] - base.scores[run.name])
            values, n = [float(np.mean(gains)) for gains in by_seed.values()], _independent(by_seed)
            entry = {"group": name, "first": protocol, "second": first, "n": n}
            test = statistics.paired(values, n) if n > 1 else None
            if test is not None:
                entry |= _interval(test[0]) | {"p": test[1]}
            else:
                entry |= {"difference": float(np.mean(values)), "low": None, "high": None, "p": None}
            images = counts.interval([(run, protocol) for run in shared], [(run, first) for run in shared])
            yield entry | {"images": None if images is None else _interval(images)}


class _Counts:
    """Per-image counts of the runs, read once each."""

    def __init__(self, enabled: bool, resamples: int) -> None:
        self.enabled, self.resamples = enabled, resamples
        self._read: dict[Path, tuple[NDArray[np.int64], NDArray[np.int64]] | None] = {}

    def between_groups(self, protocol: str) -> "Callable[[_Group, _Group], Interval | None]":
        return lambda a, b: self.interval([(run, protocol) for run in a.runs], [(run, protocol) for run in b.runs])

    def interval(self, first: Sequence[tuple[Run, str]], second: Sequence[tuple[Run, str]]) -> Interval | None:
        """In percentage points; None where counts are missing or the images differ."""
        read = [self._of(run, protocol) for run, protocol in (*first, *second)] if self.enabled else []
        present = [counts for counts in read if counts is not None]
        if not first or not second or len(present) < len(first) + len(second):
            return None
        index, example = present[0]
        same = all(np.array_equal(i, index) and c.shape == example.shape for i, c in present)
        if not same or len(index) < 2:
            return None
        counts = [c for _, c in present]
        found = statistics.bootstrap_images(counts[: len(first)], counts[len(first) :], resamples=self.resamples)
        return Interval(100 * found.estimate, 100 * found.low, 100 * found.high)

    def _of(self, run: Run, protocol: str) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        file = run.folder / f"counts_{run.results['split']}_{protocol}.npz"
        if file not in self._read:
            self._read[file] = None
            if file.exists():
                with np.load(file) as stored:
                    self._read[file] = stored["image_index"], stored["per_image"]
        return self._read[file]


def _interval(interval: Interval) -> dict[str, float]:
    return {"difference": interval.estimate, "low": interval.low, "high": interval.high}


def _verdict(entry: Mapping[str, Any], needed_for: float, tests: int) -> str:
    """In plain words."""
    first, second, low, high = (entry[key] for key in ("first", "second", "low", "high"))
    if low is None:
        words = f"{first} and {second}: " + (
            "nothing can be said about seeds with one run of either" if min(entry["n"]) < 2
            else "no spread in a group: nothing to test against"
        )  # fmt: skip
    elif entry["p_holm"] < ALPHA:
        better, worse = (first, second) if entry["difference"] > 0 else (second, first)
        corrected = f", corrected for {tests} comparisons" if tests > 1 else ""
        words = (
            f"{better} is better than {worse} by {abs(entry['difference']):.2f}: 95% interval of {first} - {second} "
            f"{low:+.2f} to {high:+.2f}, p = {entry['p_holm']:.2g}{corrected}"
        )
    else:
        words = f"{first} and {second}: no evidence of a difference"
        if low > 0 or high < 0:
            words += f" when corrected for {tests} comparisons (p = {entry['p_holm']:.2g})"
        words += f": 95% interval {low:+.2f} to {high:+.2f}"
        needed = entry["seeds_needed"]
        words += f"; {'over 10000' if needed is None else needed} seeds per arm would resolve {needed_for:g}"
    if images := entry["images"]:
        words += f". The same networks on other such images: {images['low']:+.2f} to {images['high']:+.2f}"
    return words


# ---------------------------------------------------------------- for people


@dataclass(frozen=True)
class Section:
    """A table with notes below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def show(summary: Mapping[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    for section in sections(summary):
        if section.rows:
            table = Table(title=section.title, title_justify="left")
            for number, column in enumerate(section.columns):
                table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        for note in section.notes:
            console.print(f"* {note}", markup=False, highlight=False)


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """Write ``summary.json``, ``summary.md`` and ``summary.png``; they are made of the runs and may be made again."""
    parts = []
    for section in sections(summary):
        parts.append(f"## {section.title}\n")
        if section.rows:
            lines = [section.columns, ["---", *["---:"] * (len(section.columns) - 1)], *section.rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        parts.append("\n".join(f"* {note}" for note in section.notes) + "\n" if section.notes else "")
    report.write_text(folder / "summary.md", "\n".join(part for part in parts if part), replace=True)
    report.write_json(folder / "summary.json", summary, replace=True)
    groups = {name: content["groups"] for name, content in summary["protocols"].items()}
    if groups:
        report.plot_groups(groups, f"{summary['metric']}, %", folder / "summary.png")


def sections(summary: Mapping[str, Any]) -> Iterator[Section]:
    """What :func:`compare` found, as tables of text."""
    where = f"{summary['metric']} in %" + (f" on {summary['split']}" if summary["split"] else "")
    protocols = summary["protocols"]
    runs = {
        (group, run): [content["groups"].get(group, {"runs": {}})["runs"].get(run) for content in protocols.values()]
        for content in protocols.values()
        for group, described in content["groups"].items()
        for run in described["runs"]
    }
    rows = [[run, group, *map(_number, scores)] for (group, run), scores in runs.items()]
    notes = [*_missing(summary["missing"]), *summary["notes"]]
    yield Section(f"Runs: {where}", ["run", "group", *protocols], rows, notes)
    for protocol, content in protocols.items():
        groups = content["groups"]
        columns = ["group", "n", "mean", "sd", "95% interval", "min", "max", f"resolvable at {POWER:.0%} power"]
        rows = [
            [name, str(g["n"]), _number(g["mean"]), _number(g["sd"]), _range(g), _number(g["min"]), _number(g["max"]),
             _number(g["resolvable"])]
            for name, g in groups.items()
        ]  # fmt: skip
        notes = [note for name, group in groups.items() for note in _variance(name, group)]
        yield Section(f"Groups, {protocol}", columns, rows, notes)
        yield from _differences(protocol, content["comparisons"], summary["difference"])
    if within := summary["within_runs"]:
        columns = ["protocols", "group", "runs", "difference", "95% interval", "p", "p (Holm)", "over images"]
        rows = [
            [f"{e['first']} - {e['second']}", e["group"], str(e["n"]), _signed(e["difference"]), _range(e), _p(e["p"]),
             _p(e["p_holm"]), _range(e["images"])]
            for e in sorted(within, key=lambda e: -e["difference"])
        ]  # fmt: skip
        yield Section("Evaluation alone: protocols within the same runs", columns, rows)


def _differences(protocol: str, comparisons: Sequence[Mapping[str, Any]], needed_for: float) -> Iterator[Section]:
    if not comparisons:
        return
    ranking = any("trick" in entry for entry in comparisons)
    columns = ["difference", "95% interval", "p", "p (Holm)", "effect size", f"seeds for {needed_for:g}", "over images"]
    rows = []
    for entry in comparisons:
        head = [f"{entry['first']} - {entry['second']}"]
        if ranking:
            head = [entry.get("trick", head[0]), entry.get("context", "")]
        # Without an interval there are no seeds to speak of; with one, None means more than anyone has.
        needed = "-" if entry["low"] is None else str(entry["seeds_needed"] or "> 10000")
        rows.append(
            [*head, _signed(entry["difference"]), _range(entry), _p(entry["p"]), _p(entry["p_holm"]),
             _signed(entry["effect_size"]), needed, _range(entry["images"])]
        )  # fmt: skip
    title = f"What each trick is worth, {protocol}" if ranking else f"Differences, {protocol}"
    head = ["trick", "context"] if ranking else ["groups"]
    yield Section(title, [*head, *columns], rows, [entry["verdict"] for entry in comparisons])


def _missing(missing: Mapping[str, str]) -> list[str]:
    return [f"missing: {name}: {reason}" for name, reason in missing.items()]


def _variance(name: str, group: Mapping[str, Any]) -> list[str]:
    if (variance := group["variance"]) is None:
        return []
    seed, repeat, p = variance["seed_sd"], variance["repeat_sd"], variance["p"]
    if seed is None:
        return [f"{name}: sd of repetitions of a seed {repeat:.3f} ({len(group['runs'])} runs of one seed)"]
    matter = "repetitions agree" if p is None else f"seeds matter: p = {p:.2g}"
    return [f"{name}: sd of seeds {seed:.3f}, of repetitions of a seed {repeat:.3f} ({matter})"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _range(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None or entry["low"] is None else f"{entry['low']:.2f} to {entry['high']:.2f}"
