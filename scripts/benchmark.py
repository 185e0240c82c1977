"""The same as ``bisenet benchmark``, from a checkout."""

from bisenet.cli import benchmark

if __name__ == "__main__":
    benchmark()
