"""The same as ``bisenet predict``, from a checkout."""

from bisenet.cli import predict

if __name__ == "__main__":
    predict()
