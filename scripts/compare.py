"""Compare groups of runs: ``python scripts/compare.py runs=outputs/sweeps/camvid by=model``."""

from omegaconf import DictConfig

from bisenet import config


@config.entry("compare")
def main(cfg: DictConfig) -> None:
    """Check the configuration, then do the work."""
    config.check(cfg)
    from bisenet import comparison, sweep

    typed: config.CompareConfig = config.typed(cfg)
    runs, missing = sweep.read_runs(_listed(typed.runs), _listed(typed.by) or None) if typed.runs else ([], {})
    summary = comparison.compare(
        runs,
        missing=missing,
        values=typed.values,
        values_protocol=typed.values_protocol,
        metric=typed.metric,
        baseline=typed.baseline,
        difference=typed.difference,
        resamples=typed.resamples,
    )
    comparison.show(summary)
    comparison.write(summary, config.output_dir())
    print(f"summary: {config.output_dir() / 'summary.md'}")


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


if __name__ == "__main__":
    main()
