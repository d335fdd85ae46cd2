"""The stages of ``bench.on_gpu``: each one is a process, ``python -m bench.gpu STAGE``."""
