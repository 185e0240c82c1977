"""Groups of runs side by side: what each scored, how far they differ, and whether that means anything.

:func:`compare` makes plain data of it, which :func:`show` and :func:`write` put before people. Scores are percentages,
differences percentage points.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bisenet import report, statistics
from bisenet.statistics import ALPHA, CONFIDENCE, POWER, Interval

FULL_RECIPE = "full recipe"
"""Name of the group that goes without no trick."""
_PIPE_WIDTH = 200  # columns of tables that go to a file or another program


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    ``name`` is unique among those that are compared; ``group`` says what groups the runs, key -> value, and
    ``ungrouped`` what else differs between them; ``seeds`` are those of initialisation and data; ``results`` is what
    ``results.json`` holds.
    """

    name: str
    folder: Path
    group: dict[str, str]
    seeds: tuple[int, int]
    results: dict[str, Any]
    ungrouped: dict[str, str] = field(default_factory=dict)


@dataclass
class _Group:
    """Runs of one group under one protocol, by seed; published scores have neither runs nor a population."""

    population: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    by_seed: dict[Any, list[float]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def add(self, name: str, score: float, seeds: tuple[int, int], run: Run | None = None) -> None:
        """Runs that have seeds and all else in common are repetitions of one experiment."""
        self.scores[name] = score
        self.by_seed.setdefault((seeds, *(run.ungrouped.items() if run else ())), []).append(score)
        self.runs += [run] if run else []

    @property
    def values(self) -> list[float]:
        """One score for each seed; repetitions of a seed are no further evidence and are averaged."""
        return [float(np.mean(scores)) for scores in self.by_seed.values()]

    @property
    def n(self) -> int:
        """As how many independent scores :attr:`values` count.

        Where the seeds of initialisation and of data are varied apart and combined, scores that share one of them are
        no independent draws. The number of values of that which has fewer of them is a safe count.
        """
        counts = [len(self.by_seed)]
        for source in (0, 1):
            if len({seeds[source] for seeds, *_ in self.by_seed}) > 1:
                counts.append(len({(seeds[source], *rest) for seeds, *rest in self.by_seed}))
        return min(counts)


_Groups = Mapping[str, _Group]
_Scored = tuple[Run, str]  # a run under a protocol
_OverImages = Callable[[Sequence[_Scored], Sequence[_Scored]], dict[str, float] | None]


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
    """Compare groups of runs under every protocol, and the protocols within the groups.

    Args:
        runs: finished runs.
        missing: run -> what is wrong with it, to be reported.
        values: group -> published scores in percent, one for each seed.
        values_protocol: protocol of the published scores.
        metric: key of a protocol's scores in ``results.json``; with dots into what it holds.
        baseline: group that the others are compared with and ranked by, largest difference first; None: all pairs.
            Never groups that were scored on different splits, images or classes or by different definitions of a
            protocol.
        difference: for which the seeds needed are stated, in (0, 100).
        resamples: bootstrap samples of the images, at least 100.

    Returns:
        Plain data, ready for JSON; the same for the same runs.

    Raises:
        ValueError: runs that cannot be compared, or an argument that is not accepted.
    """
    missing, values = dict(missing or {}), _published(values)
    if not (runs or missing or values):
        raise ValueError("runs: got none, accepted: run directories or folders of them, or published values")
    if not 0 < difference < 100:
        raise ValueError(f"difference: got {difference}, accepted: percentage points in (0, 100)")
    if resamples < 100:
        raise ValueError(f"resamples: got {resamples}, accepted: an integer of at least 100")
    protocols: dict[str, dict[str, _Group]] = {}
    for run in runs:
        for protocol, scores in run.results["protocols"].items():
            score = _select(scores, metric, f"{run.name}, {protocol}")
            if score is None:
                missing[f"{run.name}, {protocol}"] = f"{metric} is not defined"
                continue
            name, population = _label(run.group), _population(run, protocol)
            group = protocols.setdefault(protocol, {}).setdefault(name, _Group(population))
            if unlike := _unlike(group.population, population):
                apart = [key for key, value in run.ungrouped.items() if group.runs[0].ungrouped[key] != value]
                raise ValueError(
                    f"runs: {group.runs[0].name} and {run.name} of the group {name!r} were scored {unlike} under "
                    f"{protocol}; accepted: runs of one data set and one definition in a group, as with "
                    f"by=[{','.join([*run.group, *(apart or ['data'])])}]"
                )
            group.add(run.name, 100 * score, run.seeds, run)
    for name, scores in values.items():
        groups = protocols.setdefault(values_protocol, {})
        if name in groups:
            raise ValueError(f"values: got {name!r}, accepted: a name that no group of runs has")
        groups[name] = _Group({})
        for seed, score in enumerate(scores, 1):
            groups[name].add(str(seed), float(score), (seed, seed))

    known = list(dict.fromkeys(name for groups in protocols.values() for name in groups))
    if baseline is not None and baseline not in known:
        raise ValueError(f"baseline: got {baseline!r}, accepted: {', '.join(known)}")
    read = cache(_read_counts)

    def over_images(first: Sequence[_Scored], second: Sequence[_Scored]) -> dict[str, float] | None:
        sides = [[read(*scored) for scored in side] for side in (first, second)] if metric == "miou" else [[], []]
        return _bootstrap(sides[0], sides[1], resamples)

    splits = {run.results["split"] for run in runs}
    return {
        "metric": metric,
        "split": splits.pop() if len(splits) == 1 else None,
        "confidence": CONFIDENCE,
        "difference": difference,
        "missing": missing,
        "notes": list(dict.fromkeys(note for groups in protocols.values() for note in _cautions(groups))),
        "protocols": {
            protocol: {
                "groups": {name: _describe(group) for name, group in groups.items()},
                "comparisons": _comparisons(protocol, groups, baseline, difference, over_images),
            }
            for protocol, groups in protocols.items()
        },
        "within_runs": _correct(list(_gains(protocols, over_images)) if protocols else []),
    }


def _published(values: Any) -> dict[str, Sequence[float]]:
    if not isinstance(values or {}, Mapping):
        raise ValueError(f"values: got {values}, accepted: name -> list of scores in percent")
    for name, scores in (values or {}).items():
        numbers = scores if isinstance(scores, list | tuple) else []
        if not numbers or not all(isinstance(s, int | float) and (s == 0 or 1 <= s <= 100) for s in numbers):
            raise ValueError(f"values.{name}: got {scores}, accepted: a list of scores in percent, none in (0, 1)")
    return dict(values or {})


def _select(scores: Any, metric: str, where: str) -> float | None:
    for key in metric.split("."):
        if key == "definition" or not isinstance(scores, dict) or key not in scores:
            raise ValueError(f"metric: got {metric!r}, accepted: the key of a score, which {where} has not")
        scores = scores[key]
    if metric.endswith("seconds") or not (scores is None or (isinstance(scores, float) and 0 <= scores <= 1)):
        raise ValueError(f"metric: got {metric!r}, accepted: the key of a single score in [0, 1]")
    return scores


def _label(group: Mapping[str, str]) -> str:
    """Name of a group; the option group ``without`` speaks for itself."""
    words = dict(group)
    if "without" in group:
        off = sorted({*group["without"].split("+")} - {"nothing"})
        words["without"] = f"without {'+'.join(off)}" if off else FULL_RECIPE
    if len(words) == 1:
        return next(iter(words.values()))
    return ", ".join(word if key == "without" else f"{key}={word}" for key, word in words.items()) or "all runs"


def _population(run: Run, protocol: str) -> dict[str, Any]:
    """What was scored, and how; by what a difference is called."""
    scores = run.results["protocols"][protocol]
    pixels = {name: entry.get("pixels") for name, entry in scores["classes"].items()}
    return {
        "on other splits": run.results["split"],
        "by other definitions": scores.get("definition"),
        "on other images or classes": (scores.get("n_images"), pixels),
    }


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How two populations differ; empty where they are comparable."""
    return next((name for name in first if name in second and first[name] != second[name]), "")


def _cautions(groups: _Groups) -> Iterator[str]:
    """What a reader of the table must know about its groups."""
    for name, group in groups.items():
        for key in group.runs[0].ungrouped if group.runs else ():
            values = sorted({run.ungrouped[key] for run in group.runs})
            if len(values) > 1:
                yield f"{name}: its runs also differ in {key} ({', '.join(values)}): their spread is not of seeds alone"
        if group.n < len(group.by_seed):
            yield (
                f"{name}: its {len(group.by_seed)} pairs of init_seed and data_seed share seeds and count as "
                f"{group.n} (n), which errs on the safe side"
            )
    for first, second in combinations(groups, 2):
        if unlike := _unlike(groups[first].population, groups[second].population):
            yield f"{first} and {second} are not compared: they were scored {unlike}"


def _describe(group: _Group) -> dict[str, Any]:
    variance = statistics.split_variance(list(group.by_seed.values()))
    summary = asdict(statistics.summarize(group.values, group.n))
    return {"runs": group.scores, **summary, "variance": asdict(variance) if variance else None}


# ---------------------------------------------------------------- differences


def _comparisons(
    protocol: str, groups: _Groups, baseline: str | None, needed_for: float, over_images: _OverImages
) -> list[dict[str, Any]]:
    pairs = list(combinations(groups, 2))
    if baseline is not None:
        pairs = [(name, baseline) for name in groups if name != baseline and baseline in groups]
    found = []
    for first, second in pairs:
        a, b = groups[first], groups[second]
        if _unlike(a.population, b.population):
            continue
        entry = {"first": first, "second": second, "n": [a.n, b.n], "effect_size": None, "seeds_needed": None}
        test = statistics.welch(a.values, b.values, (a.n, b.n)) if min(a.n, b.n) > 1 else None
        entry |= _tested(float(np.mean(a.values) - np.mean(b.values)), (test.difference, test.p) if test else None)
        if test:
            sds = float(np.std(a.values, ddof=1)), float(np.std(b.values, ddof=1))
            entry |= {"effect_size": test.effect_size, "seeds_needed": statistics.seeds_needed(needed_for, sds)}
        images = over_images([(run, protocol) for run in a.runs], [(run, protocol) for run in b.runs])
        found.append(entry | {"images": images})
    tests = sum(entry["p"] is not None for entry in found)
    for entry in _correct(found):
        entry["verdict"] = _verdict(entry, needed_for, tests)
    return found if baseline is None else sorted(found, key=lambda entry: -entry["difference"])


def _gains(protocols: Mapping[str, _Groups], over_images: _OverImages) -> Iterator[dict[str, Any]]:
    """What evaluation alone changes: every protocol against the first one, run by run."""
    first, *others = protocols
    for protocol in others:
        for name, group in protocols[protocol].items():
            before = protocols[first][name].scores if name in protocols[first] else {}
            gain = _Group({})
            for run in group.runs:
                if run.name in before:
                    gain.add(run.name, group.scores[run.name] - before[run.name], run.seeds, run)
            if gain.runs:
                test = statistics.paired(gain.values, gain.n) if gain.n > 1 else None
                yield (
                    {"group": name, "first": protocol, "second": first, "n": gain.n}
                    | _tested(float(np.mean(gain.values)), test)
                    | {
                        "images": over_images(
                            [(run, protocol) for run in gain.runs], [(run, first) for run in gain.runs]
                        )
                    }
                )


def _tested(difference: float, test: tuple[Interval, float] | None) -> dict[str, Any]:
    low, high, p = (test[0].low, test[0].high, test[1]) if test else (None, None, None)
    return {"difference": difference, "low": low, "high": high, "p": p, "p_holm": None}


def _correct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set ``p_holm`` of entries, which are one family of tests."""
    tested = [entry for entry in entries if entry["p"] is not None]
    for entry, p in zip(tested, statistics.holm([entry["p"] for entry in tested]), strict=True):
        entry["p_holm"] = p
    return entries


def _read_counts(run: Run, protocol: str) -> tuple[bytes, NDArray[np.int64]] | None:
    """Which images were scored, and the counts of each; None where they were not kept."""
    file = run.folder / f"counts_{run.results['split']}_{protocol}.npz"
    if not file.exists():
        return None
    with np.load(file) as stored:
        return stored["image_index"].tobytes(), stored["per_image"]


def _bootstrap(first: Sequence[Any], second: Sequence[Any], resamples: int) -> dict[str, float] | None:
    """Of what :func:`_read_counts` gives, in percentage points; None where counts are missing or the images differ."""
    if not (first and second and all(first) and all(second)):
        return None
    if len({(index, counts.shape) for index, counts in (*first, *second)}) > 1 or len(first[0][1]) < 2:
        return None
    found = statistics.bootstrap_images([c for _, c in first], [c for _, c in second], resamples)
    return {"difference": 100 * found.estimate, "low": 100 * found.low, "high": 100 * found.high}


def _verdict(entry: Mapping[str, Any], needed_for: float, tests: int) -> str:
    """In plain words."""
    first, second, low, high, p = (entry[key] for key in ("first", "second", "low", "high", "p_holm"))
    if low is None:
        why = "with one run of either" if min(entry["n"]) < 2 else "without a spread in a group"
        words = f"{first} and {second}: nothing can be said about seeds {why}"
    elif p < ALPHA:
        better, worse = (first, second) if entry["difference"] > 0 else (second, first)
        corrected = f", corrected for {tests} comparisons" if tests > 1 else ""
        words = (
            f"{better} is better than {worse} by {abs(entry['difference']):.2f}: 95% interval of {first} - {second} "
            f"{low:+.2f} to {high:+.2f}, p = {p:.2g}{corrected}"
        )
    else:
        corrected = f" when corrected for {tests} comparisons (p = {p:.2g})" if low > 0 or high < 0 else ""
        words = (
            f"{first} and {second}: no evidence of a difference{corrected}: 95% interval {low:+.2f} to {high:+.2f}; "
            f"{entry['seeds_needed'] or 'over 10000'} seeds per group would resolve {needed_for:g}"
        )
    if images := entry["images"]:
        words += f". The same networks on other such images: {images['low']:+.2f} to {images['high']:+.2f}"
    return words


# ---------------------------------------------------------------- for people

_TESTED = ["difference", "95% interval", "p", "p (Holm)", "over images"]


class Section(NamedTuple):
    """A table with notes below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def show(summary: Mapping[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    for section in sections(summary):
        if section.rows:
            table = Table(title=section.title, title_justify="left")
            for number, column in enumerate(section.columns):
                table.add_column(column, justify="right" if number else "left", overflow="fold")
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        for note in section.notes:
            console.print(f"* {note}", markup=False, highlight=False)


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """Write ``summary.json``, ``summary.md`` and ``summary.png``; they are made of the runs and may be made again."""
    lines: list[str] = []
    for section in sections(summary):
        ruler = ["---"] + ["---:"] * (len(section.columns) - 1)
        table = [section.columns, ruler, *section.rows] if section.rows else []
        lines += [f"## {section.title}", "", *(f"| {' | '.join(row)} |" for row in table), *[""] * bool(table)]
        lines += [*(f"* {note}" for note in section.notes), *[""] * bool(section.notes)]
    report.write_text(folder / "summary.md", "\n".join(lines), replace=True)
    report.write_json(folder / "summary.json", summary, replace=True)
    if groups := {name: content["groups"] for name, content in summary["protocols"].items()}:
        report.plot_groups(groups, f"{summary['metric']}, %", folder / "summary.png")


def sections(summary: Mapping[str, Any]) -> Iterator[Section]:
    """What :func:`compare` found, as tables of text."""
    protocols = summary["protocols"]
    runs = dict.fromkeys(
        (g, run) for p in protocols.values() for g, found in p["groups"].items() for run in found["runs"]
    )
    rows = [
        [run, group, *(_text(p["groups"].get(group, {"runs": {}})["runs"].get(run)) for p in protocols.values())]
        for group, run in runs
    ]
    notes = [f"missing: {name}: {reason}" for name, reason in summary["missing"].items()] + summary["notes"]
    where = f"Runs: {summary['metric']} in %" + (f" on {summary['split']}" if summary["split"] else "")
    yield Section(where, ["run", "group", *protocols], rows, notes)
    for protocol, content in protocols.items():
        columns = ["group", "n", "mean", "sd", "95% interval", "min", "max", f"resolvable at {POWER:.0%} power"]
        rows = [
            [
                name,
                str(g["n"]),
                _text(g["mean"]),
                _text(g["sd"]),
                _range(g),
                *map(_text, (g["min"], g["max"], g["resolvable"])),
            ]
            for name, g in content["groups"].items()
        ]
        notes = [_variance(name, group) for name, group in content["groups"].items() if group["variance"]]
        yield Section(f"Groups, {protocol}", columns, rows, notes)
        if found := content["comparisons"]:
            columns = ["groups", *_TESTED, "effect size", f"seeds for {summary['difference']:g}"]
            # Without an interval there are no seeds to speak of; with one, None means more than anyone has.
            needed = ["-" if e["low"] is None else str(e["seeds_needed"] or "> 10000") for e in found]
            rows = [
                [*_tested_row(e), _text(e["effect_size"], "+.2f"), seeds]
                for e, seeds in zip(found, needed, strict=True)
            ]
            yield Section(f"Differences, {protocol}", columns, rows, [entry["verdict"] for entry in found])
    if within := sorted(summary["within_runs"], key=lambda entry: -entry["difference"]):
        rows = [[*_tested_row(entry), entry["group"], str(entry["n"])] for entry in within]
        title = "Evaluation alone: protocols within the same runs"
        yield Section(title, ["protocols", *_TESTED, "group", "runs"], rows, [])


def _variance(name: str, group: Mapping[str, Any]) -> str:
    seed, repeat, p = (group["variance"][key] for key in ("seed_sd", "repeat_sd", "p"))
    if seed is None:
        return f"{name}: sd of repetitions of a seed {repeat:.3f} ({len(group['runs'])} runs of one seed)"
    matter = "repetitions agree" if p is None else f"seeds matter: p = {p:.2g}"
    return f"{name}: sd of seeds {seed:.3f}, of repetitions of a seed {repeat:.3f} ({matter})"


def _tested_row(entry: Mapping[str, Any]) -> list[str]:
    pair = f"{entry['first']} - {entry['second']}"
    p_values = _text(entry["p"], ".2g"), _text(entry["p_holm"], ".2g")
    return [pair, _text(entry["difference"], "+.2f"), _range(entry), *p_values, _range(entry["images"])]


def _text(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _range(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None or entry["low"] is None else f"{entry['low']:.2f} to {entry['high']:.2f}"
