"""Data shipped with the package: mapping matrices and the calibration text (see SOURCES.md)."""
