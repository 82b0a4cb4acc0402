"""Loading and running artifacts with torch and tvm_ffi alone (no TVM, no transformers)."""
