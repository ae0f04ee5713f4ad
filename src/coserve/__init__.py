"""coserve: one server that generates text and finetunes adapters in the same iterations.

The packages `coserve.server`, `coserve.scheduler` and `coserve.kernels` stand at the top level of
the repository and are linked here, so that they can only be imported under the name `coserve`.
"""

__version__ = "0.1.0"
