"""The same as ``bisenet compare``, from a checkout."""

from bisenet.cli import compare

if __name__ == "__main__":
    compare()
