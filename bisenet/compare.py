"""Compare groups of runs: their scores, the differences between them, and whether these are significant.

:func:`compare` returns plain data, which :func:`show` prints and :func:`write` saves. Scores are percentages,
differences percentage points.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bisenet import report, statistics
from bisenet.statistics import ALPHA, CONFIDENCE, POWER, Tested

FULL_RECIPE = "full recipe"
"""Name of the group whose option ``without`` switches nothing off."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    ``name`` is unique among the compared runs. ``group`` maps the keys that the runs are grouped by to their values,
    ``ungrouped`` the other keys that differ between runs. ``seeds`` are the seeds of initialisation and of data.
    ``results`` is the content of ``results.json``.
    """

    name: str
    folder: Path
    group: dict[str, str]
    seeds: tuple[int, int]
    results: dict[str, Any]
    ungrouped: dict[str, str] = field(default_factory=dict)


_Counts = tuple[bytes, NDArray[np.int64]] | None  # indices of the scored images, counts (n, 3, C); None: no file


@dataclass
class _Group:
    """Scores in percent of one group under one protocol; published scores have neither runs nor a population."""

    population: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    by_seed: dict[Any, list[float]] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    counts: dict[str, _Counts] = field(default_factory=dict)

    def add(self, name: str, score: float, seeds: tuple[int, int], run: Run | None = None) -> None:
        """Add a score; runs with the same seeds and the same ``ungrouped`` values are repetitions of one experiment."""
        self.scores[name] = score
        self.by_seed.setdefault((seeds, *(run.ungrouped.items() if run else ())), []).append(score)
        if run:
            self.runs[name] = run

    @property
    def values(self) -> list[float]:
        """One score for each experiment: the mean of its repetitions, which are not independent evidence."""
        return [float(np.mean(scores)) for scores in self.by_seed.values()]

    @property
    def n(self) -> int:
        """The number of independent scores that :attr:`values` count as.

        If the seeds of initialisation and of data are crossed, scores that share one of them are not independent. The
        smaller of the two numbers of distinct seeds is then a safe count.
        """
        varied = [source for source in (0, 1) if len({seeds[source] for seeds, *_ in self.by_seed}) > 1]
        shared = [len({(seeds[source], *rest) for seeds, *rest in self.by_seed}) for source in varied]
        return min(shared, default=len(self.by_seed))


_Groups = Mapping[str, _Group]


def compare(
    runs: Sequence[Run],
    *,
    missing: Mapping[str, str] | None = None,
    values: Mapping[str, Sequence[float]] | None = None,
    values_protocol: str = "ss",
    metric: str = "miou",
    baseline: str | None = None,
    difference: float = 0.5,
) -> dict[str, Any]:
    """Compare groups of runs under every protocol, and the protocols within the groups.

    Groups are not compared if they were scored on different splits, images or classes, or under different definitions
    of a protocol.

    Args:
        runs: finished runs.
        missing: name of a run without usable results -> the reason; it is reported.
        values: group -> published scores in percent, one for each seed.
        values_protocol: protocol of the published scores.
        metric: key of a score of a protocol in ``results.json``; dots lead into nested scores.
        baseline: the group that all others are compared with, sorted by difference, largest first; None: all pairs.
        difference: in percentage points, in (0, 100); the number of seeds that it takes to find it is reported.

    Returns:
        Plain data, ready for JSON.

    Raises:
        ValueError: runs that cannot be compared, or an argument that is not accepted.
    """
    missing, values = dict(missing or {}), values or {}
    if not (runs or missing or values):
        raise ValueError("runs: got none, accepted: run directories or folders of them, or published values")
    if not 0 < difference < 100:
        raise ValueError(f"difference: got {difference}, accepted: percentage points in (0, 100)")
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
                first = next(iter(group.runs.values()))
                apart = [key for key, value in run.ungrouped.items() if first.ungrouped[key] != value]
                raise ValueError(
                    f"runs: {first.name} and {run.name} of the group {name!r} were scored {unlike} under "
                    f"{protocol}; accepted: runs of one data set and one definition in a group, as with "
                    f"by=[{','.join([*run.group, *(apart or ['data'])])}]"
                )
            group.add(run.name, 100 * score, run.seeds, run)
            group.counts[run.name] = _read_counts(run, protocol) if metric == "miou" else None
    if not isinstance(values, Mapping):
        raise ValueError(f"values: got {values}, accepted: name -> list of scores in percent")
    for name, scores in values.items():
        groups = protocols.setdefault(values_protocol, {})
        if name in groups:
            raise ValueError(f"values: got {name!r}, accepted: a name that no group of runs has")
        if not isinstance(scores, list) or not scores or not all(s == 0 or 1 <= s <= 100 for s in scores):
            raise ValueError(f"values.{name}: got {scores}, accepted: a list of scores in percent, none in (0, 1)")
        groups[name] = _Group({})
        for seed, score in enumerate(scores, 1):
            groups[name].add(str(seed), float(score), (seed, seed))

    known = dict.fromkeys(name for groups in protocols.values() for name in groups)
    if baseline is not None and baseline not in known:
        raise ValueError(f"baseline: got {baseline!r}, accepted: {', '.join(known)}")
    splits = {run.results["split"] for run in runs}
    notes = dict.fromkeys(note for groups in protocols.values() for note in _cautions(groups))
    found = {
        protocol: {
            "groups": {name: _describe(group) for name, group in groups.items()},
            "comparisons": _comparisons(groups, baseline, difference),
        }
        for protocol, groups in protocols.items()
    }
    return {"metric": metric, "split": splits.pop() if len(splits) == 1 else None, "confidence": CONFIDENCE,
            "difference": difference, "missing": missing, "notes": list(notes), "protocols": found,
            "within_runs": _correct(list(_gains(protocols)))}  # fmt: skip


def _select(scores: Any, metric: str, where: str) -> float | None:
    """Return the score at the dotted key ``metric``, in [0, 1] or None; ``where`` names the scores in messages."""
    for key in metric.split("."):
        if key in ("definition", "seconds") or not isinstance(scores, dict) or key not in scores:
            raise ValueError(f"metric: got {metric!r}, accepted: the key of a score; {where} has no such score")
        scores = scores[key]
    if not (scores is None or (isinstance(scores, float) and 0 <= scores <= 1)):
        raise ValueError(f"metric: got {metric!r}, accepted: the key of a single score in [0, 1]")
    return scores


def _label(group: Mapping[str, str]) -> str:
    """Return the name of a group; the key ``without`` becomes "without a+b" or :data:`FULL_RECIPE`."""
    words = {key: value if len(group) == 1 else f"{key}={value}" for key, value in group.items()}
    if "without" in group:
        off = sorted({*group["without"].split("+")} - {"nothing"})
        words["without"] = f"without {'+'.join(off)}" if off else FULL_RECIPE
    return ", ".join(words.values()) or "all runs"


def _population(run: Run, protocol: str) -> dict[str, Any]:
    """Return what must agree for scores to be comparable, keyed by the words that report a disagreement."""
    scores = run.results["protocols"][protocol]
    images = scores.get("n_images"), {name: entry.get("pixels") for name, entry in scores["classes"].items()}
    definition = scores.get("definition")
    return {"on other splits": run.results["split"], "by other definitions": definition,
            "on other images or classes": images}  # fmt: skip


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return the key in which two populations differ, such as "on other splits"; empty if they are comparable."""
    return next((name for name in first if name in second and first[name] != second[name]), "")


def _cautions(groups: _Groups) -> Iterator[str]:
    """Yield notes on limits of the groups: other differences within one, shared seeds, groups not comparable."""
    for name, group in groups.items():
        ungrouped = [run.ungrouped for run in group.runs.values()]
        for key in dict.fromkeys(key for keys in ungrouped for key in keys):
            if len(values := sorted({keys[key] for keys in ungrouped})) > 1:
                yield f"{name}: its runs also differ in {key} ({', '.join(values)}): their spread is not of seeds alone"
        if group.n < (pairs := len(group.by_seed)):
            share = f"its {pairs} pairs of init_seed and data_seed share seeds and count as {group.n} (n)"
            yield f"{name}: {share}, which errs on the safe side"
    for first, second in combinations(groups, 2):
        if unlike := _unlike(groups[first].population, groups[second].population):
            yield f"{first} and {second} are not compared: they were scored {unlike}"


def _describe(group: _Group) -> dict[str, Any]:
    variance = statistics.split_variance(list(group.by_seed.values()))
    summary = asdict(statistics.summarize(group.values, group.n))
    return {"runs": group.scores, **summary, "variance": asdict(variance) if variance else None}


# ---------------------------------------------------------------- differences


def _comparisons(groups: _Groups, baseline: str | None, needed_for: float) -> list[dict[str, Any]]:
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
        entry |= _tested(float(np.mean(a.values) - np.mean(b.values)), test)
        if test:
            sds = float(np.std(a.values, ddof=1)), float(np.std(b.values, ddof=1))
            entry |= {"effect_size": test.effect_size, "seeds_needed": statistics.seeds_needed(needed_for, sds)}
        found.append(entry | {"images": _over_images(list(a.counts.values()), list(b.counts.values()))})
    tests = sum(entry["p"] is not None for entry in found)
    for entry in _correct(found):
        entry["verdict"] = _verdict(entry, needed_for, tests)
    return found if baseline is None else sorted(found, key=lambda entry: -entry["difference"])


def _gains(protocols: Mapping[str, _Groups]) -> Iterator[dict[str, Any]]:
    """Yield, for each protocol but the first and each group, the mean difference to the first within the same runs."""
    first = next(iter(protocols), "")
    for protocol, name in [(p, name) for p, groups in protocols.items() if p != first for name in groups]:
        group, before = protocols[protocol][name], protocols[first].get(name, _Group({}))
        gain = _Group({})
        for run in group.runs.values():
            if run.name in before.runs:
                gain.add(run.name, group.scores[run.name] - before.scores[run.name], run.seeds, run)
        if gain.runs:
            test = statistics.paired(gain.values, gain.n) if gain.n > 1 else None
            images = _over_images(*([side.counts[run] for run in gain.runs] for side in (group, before)))
            entry = {"group": name, "first": protocol, "second": first, "n": gain.n, "images": images}
            yield entry | _tested(float(np.mean(gain.values)), test)


def _tested(difference: float, test: Tested | None) -> dict[str, Any]:
    low, high, p = (test.low, test.high, test.p) if test else (None, None, None)
    return {"difference": difference, "low": low, "high": high, "p": p, "p_holm": None}


def _correct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set and return the entries' ``p_holm``: their ``p``, corrected as one family of tests."""
    tested = [entry for entry in entries if entry["p"] is not None]
    for entry, p in zip(tested, statistics.holm([entry["p"] for entry in tested]), strict=True):
        entry["p_holm"] = p
    return entries


def _read_counts(run: Run, protocol: str) -> _Counts:
    file = run.folder / f"counts_{run.results['split']}_{protocol}.npz"
    if not file.exists():
        return None
    with np.load(file) as stored:
        return stored["image_index"].tobytes(), stored["per_image"]


def _over_images(first: Sequence[_Counts], second: Sequence[_Counts]) -> dict[str, float] | None:
    """Bootstrap a difference over images, in percentage points; None if counts are missing or images differ."""
    a, b = ([counts for counts in side if counts] for side in (first, second))
    images = {(index, counts.shape) for index, counts in a + b}
    if not (a and b and len(a + b) == len(first) + len(second)) or len(images) > 1 or len(a[0][1]) < 2:
        return None
    found = statistics.bootstrap_images([counts for _, counts in a], [counts for _, counts in b])
    return {"difference": 100 * found.estimate, "low": 100 * found.low, "high": 100 * found.high}


def _verdict(entry: Mapping[str, Any], needed_for: float, tests: int) -> str:
    """Return the result of a comparison as a sentence; ``tests`` is how many tests ``p_holm`` corrects for."""
    first, second, low, high, p = (entry[key] for key in ("first", "second", "low", "high", "p_holm"))
    corrected = f"corrected for {tests} comparisons"
    if low is None:
        why = "with one run of either" if min(entry["n"]) < 2 else "without a spread in a group"
        words = f"{first} and {second}: nothing can be said about seeds {why}"
    elif p < ALPHA:
        better, worse = (first, second) if entry["difference"] > 0 else (second, first)
        words = (
            f"{better} is better than {worse} by {abs(entry['difference']):.2f}: 95% interval of {first} - {second} "
            f"{low:+.2f} to {high:+.2f}, p = {p:.2g}{f', {corrected}' if tests > 1 else ''}"
        )
    else:
        when = f" when {corrected} (p = {p:.2g})" if low > 0 or high < 0 else ""
        words = (
            f"{first} and {second}: no evidence of a difference{when}: 95% interval {low:+.2f} to {high:+.2f}; "
            f"{entry['seeds_needed'] or 'over 10000'} seeds per group would resolve {needed_for:g}"
        )
    if images := entry["images"]:
        words += f". The same networks on other such images: {images['low']:+.2f} to {images['high']:+.2f}"
    return words


# ---------------------------------------------------------------- for people

_TESTED = ["difference", "95% interval", "p", "p (Holm)", "over images"]


class Section(NamedTuple):
    """A table, possibly without rows, with notes below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def show(summary: Mapping[str, Any]) -> None:
    """Print the tables and notes of what :func:`compare` returned."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # output goes to a file or to another program
    for title, columns, rows, notes in sections(summary):
        if rows:
            table = Table(title=title, title_justify="left")
            for number, column in enumerate(columns):
                table.add_column(column, justify="right" if number else "left", overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for note in notes:
            console.print(f"* {note}", markup=False, highlight=False)


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """Write ``summary.json``, ``summary.md`` and ``summary.png``, replacing earlier ones."""
    text = ""
    for title, columns, rows, notes in sections(summary):
        blocks = [report.markdown(columns, rows) if rows else "", "".join(f"* {note}\n" for note in notes)]
        text += "\n".join([f"## {title}\n", *filter(None, blocks)]) + "\n"
    report.write_text(folder / "summary.md", text)
    report.write_json(folder / "summary.json", summary)
    if groups := {name: content["groups"] for name, content in summary["protocols"].items()}:
        report.plot_groups(groups, f"{summary['metric']}, %", folder / "summary.png")


def sections(summary: Mapping[str, Any]) -> Iterator[Section]:
    """Yield what :func:`compare` returned as tables of text."""
    protocols = summary["protocols"]
    rows: dict[tuple[str, str], dict[str, float]] = {}  # group and run -> protocol -> score
    for protocol, content in protocols.items():
        for group, found in content["groups"].items():
            for run, score in found["runs"].items():
                rows.setdefault((run, group), {})[protocol] = score
    notes = [f"missing: {name}: {reason}" for name, reason in summary["missing"].items()] + summary["notes"]
    where = f"Runs: {summary['metric']} in %" + (f" on {summary['split']}" if summary["split"] else "")
    cells = [[*names, *(_text(scores.get(protocol)) for protocol in protocols)] for names, scores in rows.items()]
    yield Section(where, ["run", "group", *protocols], cells, notes)
    for protocol, content in protocols.items():
        groups, found = content["groups"], content["comparisons"]
        columns = ["group", "n", "mean", "sd", "95% interval", "min", "max", f"resolvable at {POWER:.0%} power"]
        cells = [[name, str(g["n"]), _text(g["mean"]), _text(g["sd"]), _range(g), *map(_text, (g["min"], g["max"])),
                  _text(g["resolvable"])] for name, g in groups.items()]  # fmt: skip
        notes = [_variance(name, group) for name, group in groups.items() if group["variance"]]
        yield Section(f"Groups, {protocol}", columns, cells, notes)
        if found:
            columns = ["groups", *_TESTED, "effect size", f"seeds for {summary['difference']:g}"]
            # Without an interval the number of seeds is unknown; with one, None means more than 10000.
            needed = ["-" if e["low"] is None else str(e["seeds_needed"] or "> 10000") for e in found]
            cells = [[*_tested_row(e), _text(e["effect_size"], "+.2f"), n] for e, n in zip(found, needed, strict=True)]
            yield Section(f"Differences, {protocol}", columns, cells, [entry["verdict"] for entry in found])
    if within := sorted(summary["within_runs"], key=lambda entry: -entry["difference"]):
        cells = [[*_tested_row(entry), entry["group"], str(entry["n"])] for entry in within]
        title = "Evaluation alone: protocols within the same runs"
        yield Section(title, ["protocols", *_TESTED, "group", "runs"], cells, [])


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
