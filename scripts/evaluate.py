"""The same as ``bisenet evaluate``, from a checkout."""

from bisenet.cli import evaluate

if __name__ == "__main__":
    evaluate()
