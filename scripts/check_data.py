"""Look at a data set before training on it: ``python scripts/check_data.py data=cityscapes data.root=...``."""

import sys

from omegaconf import DictConfig

from bisenet import config


@config.entry("check_data")
def main(cfg: DictConfig) -> None:
    """Check the configuration, then do the work; exit code 1 unless the data set is fit to train on."""
    config.check(cfg)
    from bisenet import experiment  # heavy: only once the configuration is sound

    if not experiment.check_data(config.typed(cfg), config.output_dir()):
        sys.exit(1)


if __name__ == "__main__":
    main()
