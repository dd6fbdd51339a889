"""The processes, each a thin layer over `baton`."""

from baton import __version__ as __version__
