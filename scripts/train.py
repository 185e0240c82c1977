"""Train and evaluate a model, or with -m many: ``python scripts/train.py experiment=demo trainer.max_steps=500``."""

from omegaconf import DictConfig

from bisenet import config, launch, sweep


@config.entry("train")
def main(cfg: DictConfig) -> None:
    """Check the configuration, then do the work."""
    if sweep.is_job():
        config.check(cfg)
        continued = sweep.job(cfg)
        if continued is None:
            return
        cfg = continued
    elif cfg.resume is not None:
        cfg = config.resumed(cfg, config.overrides())
    else:
        config.check(cfg)
    launch.train(cfg, config.output_dir())


if __name__ == "__main__":
    sweep.run(main)
