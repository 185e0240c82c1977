"""The same as ``bisenet check-data``, from a checkout."""

from bisenet.cli import check_data

if __name__ == "__main__":
    check_data()
