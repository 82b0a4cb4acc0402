"""The ops a Program may call, by name: one whitelist for text, JSON, verifier and capture.

A name is "aten.linear.default", "liftc.lift.default" or "operator.getitem". Graphs come from files, so the
whitelist is also the security boundary of an artifact: an op is on it only if it computes on the tensors
and numbers it is given and checks its indices. Left out on purpose: ops that reach files or the process
(`aten.from_file`, `aten.save`, `aten._print`), replace or reinterpret storage (`set_`, `set_data`, `resize_`,
`_*_unsafe`), skip bounds checks (`_unsafe_index`, `_index_put_impl_`, sparse and quantized constructors,
backward kernels), or only make sense in training.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from liftc import ir

ALLOWED_OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "getitem add sub mul floordiv truediv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ xor"
        ).split()
    },
    **{f"math.{name}": getattr(math, name) for name in "ceil floor trunc sqrt".split()},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sqrt sym_sum".split()
    },
}
"""Plain functions a graph may call: arithmetic on sizes and getitem on the results of multi-output ops."""

_ELEMENTWISE = """
abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min copysign cos cosh deg2rad div
elu eq erf erfc exp exp2 expm1 fill floor floor_divide fmax fmin fmod frac ge gelu glu gt hardshrink
hardsigmoid hardswish hardtanh heaviside hypot isclose isfinite isinf isnan isneginf isposinf le leaky_relu
lerp log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
logit lt masked_fill maximum minimum mish mul nan_to_num ne neg polar positive pow prelu rad2deg reciprocal
relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
special_erf special_expit sqrt square sub tan tanh threshold true_divide trunc where xlogy zero __and__
__lshift__ __or__ __rshift__ __xor__
"""
_REDUCTION = """
all amax amin aminmax any argmax argmin argsort bincount count_nonzero cummax cummin cumprod cumsum
cumulative_trapezoid diff equal kthvalue linalg_matrix_norm linalg_norm linalg_vector_norm log_softmax
logcumsumexp logsumexp max mean median min mode nanmean nansum norm prod softmax sort std std_mean sum topk
trace unique_consecutive var var_mean _log_softmax _safe_softmax _softmax
"""
_SHAPE = """
adjoint alias as_strided atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cat
chunk clone column_stack concat concatenate contiguous copy detach diag diag_embed diagonal dstack expand
expand_as flatten flip fliplr flipud hstack lift_fresh lift_fresh_copy mH mT moveaxis movedim narrow numpy_T
permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as resolve_conj
resolve_neg roll select slice split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile
transpose tril triu unbind unflatten unfold unsqueeze view view_as view_as_complex view_as_real vstack
_reshape_alias _shape_as_tensor _unsafe_view
"""
_INDEX = """
bucketize diagonal_scatter embedding gather index index_add index_copy index_fill index_put index_reduce
index_select isin masked_scatter masked_select nonzero nonzero_static one_hot scatter scatter_add
scatter_reduce searchsorted select_scatter slice_scatter take take_along_dim
"""
_CREATION = """
arange empty empty_like eye full full_like hann_window linspace new_empty new_full new_ones new_zeros ones
ones_like rand rand_like randint randn randn_like scalar_tensor tril_indices triu_indices zeros zeros_like
"""
_MATMUL = """
addbmm addmm addmv baddbmm bilinear bmm chain_matmul dot einsum inner kron linalg_cross linalg_multi_dot
linear matmul mm mv outer tensordot vdot _grouped_mm
"""
_NETWORK = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm constant_pad_nd conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d convolution cosine_similarity dropout feature_dropout
group_norm gru instance_norm layer_norm lstm max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
native_batch_norm native_dropout native_group_norm native_layer_norm pad reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d rms_norm rnn_relu rnn_tanh scaled_dot_product_attention
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
_adaptive_avg_pool2d _fused_rms_norm _native_batch_norm_legit_no_training
_scaled_dot_product_flash_attention_for_cpu
"""
_SIZES_AND_TYPES = """
complex imag is_floating_point item numel real size sym_constrain_range sym_constrain_range_for_size
sym_numel sym_size sym_stride to type_as _assert_async _assert_scalar _assert_tensor_metadata
_local_scalar_dense _to_copy
"""

ALLOWED_ATEN: frozenset[str] = frozenset(
    " ".join(
        (_ELEMENTWISE, _REDUCTION, _SHAPE, _INDEX, _CREATION, _MATMUL, _NETWORK, _SIZES_AND_TYPES)
    ).split()
)
"""aten ops a graph may call, any overload; the in-place form (`copy_` of `copy`) comes with the op."""

_NAME = re.compile(r"(aten|liftc)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_OPERATOR_NAMES = {id(target): name for name, target in ALLOWED_OPERATORS.items()}


def op_name(target: object) -> str:
    """Name of a call_function target; raises ValueError when the target is not on the whitelist."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if op_target(name) is not target:
            raise ValueError(f"{name} is not the op registered under that name")
        return name
    name = _OPERATOR_NAMES.get(id(target), "")
    if not name:
        raise ValueError(f"{_describe(target)} is not an op that a program may call")
    return name


@lru_cache(maxsize=4096)
def op_target(name: str) -> Callable[..., Any]:
    """The function behind a name; raises ValueError when the name is unknown or not on the whitelist."""
    if name in ALLOWED_OPERATORS:
        return ALLOWED_OPERATORS[name]
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is not the name of an op that a program may call")
    namespace, base, overload = match.groups()
    if namespace == "liftc":
        allowed = base in ir.SCHEMAS
    else:
        allowed = base in ALLOWED_ATEN or _functional_form(base) in ALLOWED_ATEN
    packet = getattr(getattr(torch.ops, namespace), base, None) if allowed else None
    if packet is None or overload not in packet.overloads() or not _is_tensor_op(namespace, base, overload):
        raise ValueError(f"{name} is not on the list of ops that a program may call")
    target: Callable[..., Any] = getattr(packet, overload)
    return target


def _functional_form(base: str) -> str:
    """`copy` for `copy_`; dunder names are returned as they are."""
    return base[:-1] if base.endswith("_") and not base.endswith("__") else base


def _is_tensor_op(namespace: str, base: str, overload: str) -> bool:
    """True for ops of the tensor dispatcher: TorchScript's string, list and file ops share the namespace."""
    suffix = "" if overload == "default" else f".{overload}"
    return namespace == "liftc" or bool(torch._C._dispatch_has_kernel(f"aten::{base}{suffix}"))


def _describe(target: object) -> str:
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__qualname__", None) or repr(target)
    return f"{module}.{name}" if module else str(name)
