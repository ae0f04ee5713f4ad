"""Dropout whose mask depends on what a row is, never on where it runs."""

from coserve.kernels.dropout.reference import RowKeys, dropout_rows

__all__ = ["RowKeys", "dropout_rows"]
