"""BiSeNet real-time semantic segmentation: train, evaluate, compare and ship, configured by Hydra, run by Lightning."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from bisenet.inference import Segmenter

__all__ = ["conf_dir", "load"]


def load(
    path: "str | PathLike[str]", data: "str | Mapping[str, Any] | None" = None, trust: "Sequence[str]" = ()
) -> "Segmenter":
    """Load a trained model from a checkpoint file or a run directory; neither needs any other file.

    >>> model = bisenet.load("outputs/demo/2026-01-01_12-00-00")
    >>> train_ids = model.predict(rgb_uint8_array)  # (H, W, 3) -> (H, W)

    The reference's published weights contain no class table, so ``data`` gives the data set: the name of an option of
    ``conf/data``, or a mapping with ``classes``, ``mean`` and ``std``:

    >>> model = bisenet.load("model_final_v2_city.pth", data="cityscapes")

    Loading a file never runs code from it: a network class of your own is built only if ``trust`` lists the module
    that defines it, as in ``trust=["mynet"]``.
    """
    from bisenet import checkpoint  # torch is imported only when it is needed

    return checkpoint.read(path, read_data(data) if isinstance(data, str) else data).segmenter(trust=trust)


def read_data(name: str) -> dict[str, Any]:
    """Read ``conf/data/<name>.yaml``, merged over the files in its ``defaults``; an unknown name is a ValueError."""
    import yaml

    folder = Path(conf_dir(), "data")
    options = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name not in options:
        raise ValueError(f"data: got {name!r}, accepted: {' | '.join(options)}")
    node = yaml.safe_load(options[name].read_text(encoding="utf-8"))
    inherited = [read_data(other) for other in node.pop("defaults", []) if other in options]
    return {key: value for part in (*inherited, node) for key, value in part.items()}


def conf_dir() -> str:
    """Absolute path of ``conf/``: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    return str(next(path for path in (package / "conf", package.parent / "conf") if path.is_dir()))
