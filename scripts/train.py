"""The same as ``bisenet train``, from a checkout."""

from bisenet.cli import train

if __name__ == "__main__":
    train()
