"""Errors whose message is written for the user: one sentence saying what, where and what to do."""

from __future__ import annotations


class LiftcError(Exception):
    """A mistake the user can mend. The CLI prints the message alone and exits with code 2."""


class FormatError(LiftcError):
    """A bit-width or LQ-D/d format that does not exist."""


class CaptureError(LiftcError):
    """The model could not be turned into a graph."""


class CheckpointError(LiftcError):
    """A model folder, safetensors or GGUF file that is missing, truncated or malformed."""


class QuantizeError(LiftcError):
    """Weights, calibration data or options the quantizer refuses."""


class VerifyError(LiftcError):
    """A program that breaks a rule of `liftc/verify.py`; the message quotes the rule and the node."""


class ParseError(LiftcError):
    """Program text that cannot be parsed; the message gives the line number."""


class BuildError(LiftcError):
    """Kernels that could not be built (missing toolchain, unknown architecture, compiler failure)."""


class ArtifactError(LiftcError):
    """An artifact folder that is incomplete, altered, or of another version."""


class TargetError(LiftcError):
    """An artifact that holds no code for the device it is loaded on."""


class RecordError(LiftcError):
    """Records of kernel measurements that cannot be read or written, or a bundle of candidates that is damaged."""
