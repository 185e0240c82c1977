"""Evaluate a checkpoint from itself alone: ``python scripts/evaluate.py checkpoint=outputs/demo/<date_time>``."""

from omegaconf import DictConfig

from bisenet import config


@config.entry("evaluate")
def main(cfg: DictConfig) -> None:
    """Check the configuration, then do the work."""
    config.check(cfg)
    from bisenet import experiment  # heavy: only once the configuration is sound

    experiment.evaluate(config.typed(cfg), config.output_dir())


if __name__ == "__main__":
    main()
