"""Size of the house: lines by file, floors, and import arrows between files: ``python scripts/size.py``.

An arrow is an import of one file by another, wherever it stands, but for imports that only type checkers see. A
package's inner imports (networks, data) are not counted.
"""

import ast
from collections import Counter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print the table."""
    graph = grimp.build_graph("bisenet", exclude_type_checking_imports=True)
    arrows = {
        (module, other)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
        if unit(module) != unit(other) and "bisenet" not in (module, other)
    }
    floors: dict[str, int] = {}

    def floor(of: str) -> int:
        below = [floor(unit(other)) for module, other in arrows if unit(module) == of]
        return floors.setdefault(of, 1 + max(below, default=0))

    for name in {unit(module) for module in graph.modules}:
        floor(name)
    files = sorted((ROOT / "bisenet").rglob("*.py"))
    for file in files:
        print(f"{lines(file):6} {file.relative_to(ROOT)}")
    print(f"{sum(map(lines, files)):6} lines in bisenet/, {sum(map(lines, (ROOT / 'tests').glob('*.py')))} in tests/")
    kinds = sum(map(kinds_of_lines, files), Counter[str]())
    print(f"       of those in bisenet/: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    print(f"{len(arrows):6} import arrows between files")
    print(f"{max(floors.values()):6} floors: " + "; ".join(
        f"{n} " + " ".join(sorted(name.removeprefix("bisenet.") for name, f in floors.items() if f == n))
        for n in range(1, max(floors.values()) + 1)))  # fmt: skip


def unit(module: str) -> str:
    """A file, or the package below ``bisenet`` that it belongs to."""
    return ".".join(module.split(".")[:2])


def lines(file: Path) -> int:
    """Physical lines."""
    return len(file.read_text().splitlines())


def kinds_of_lines(file: Path) -> Counter[str]:
    """How many lines of a file are code, documentation (of attributes as well), comments and blank."""
    text = file.read_text()
    alone = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    documentation = {line for n in alone for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    kinds = Counter[str]()
    for number, line in enumerate(text.splitlines(), 1):
        start = line.lstrip()[:1]
        kinds["documentation" if number in documentation else {"": "blank", "#": "comments"}.get(start, "code")] += 1
    return kinds


if __name__ == "__main__":
    main()
