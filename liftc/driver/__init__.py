"""The commands as library functions: the only package that sees passes, codegen and runtime together."""
