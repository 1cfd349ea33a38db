"""Finds the native extension, and says so once where there is none."""

import logging
from importlib import import_module
from types import ModuleType

logger = logging.getLogger(__name__)


def load_kernels() -> ModuleType | None:
    """The extension, or None (said once, with the way to get it) if this installation has none."""
    try:
        return import_module("glm52._kernels")
    except ImportError:
        logger.warning(
            "native kernels are not built: the reference operators run instead, slower; install a C++ compiler and run "
            "pip install again"
        )
        return None
