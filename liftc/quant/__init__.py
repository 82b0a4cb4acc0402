"""Quantizer: mapping matrices, encoder, whitening, calibration, block LDLQ."""
