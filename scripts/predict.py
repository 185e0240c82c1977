"""Segment pictures and videos: ``python scripts/predict.py checkpoint=outputs/demo/<date_time> input=street.mp4``."""

import sys

from omegaconf import DictConfig

from bisenet import config


@config.entry("predict")
def main(cfg: DictConfig) -> None:
    """Check the configuration, then do the work; exit code 1 if an input could not be read."""
    config.check(cfg)
    from bisenet import experiment  # heavy: only once the configuration is sound

    if experiment.predict(config.typed(cfg), config.output_dir()):
        sys.exit(1)


if __name__ == "__main__":
    main()
