"""The version, which was that of the repository's tag when the package was built."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("spectral_kernels")
except PackageNotFoundError:  # a checkout that nobody has installed
    __version__ = "0+unknown"
