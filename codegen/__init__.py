"""Kernels: TensorIR definitions, schedules, and the build of one shared object per target."""
