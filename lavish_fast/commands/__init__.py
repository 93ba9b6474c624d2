"""The commands of `lavish-fast`, a module each; `lavish_fast.cli` puts them together.

Whatever is slow to import is imported inside the commands, so that `--help` is quick.
"""
