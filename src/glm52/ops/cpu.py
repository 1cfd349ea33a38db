"""Finds the native extension, and says so once where there is none."""

import logging
from importlib import import_module
from types import ModuleType

from glm52.errors import ConfigError

logger = logging.getLogger(__name__)


def load_kernels() -> ModuleType | None:
    """The extension, or None (said once, with the way to get it) if this installation has none.

    Raises ConfigError where there is one that refuses, as for a ``GLM52_ISA`` that this CPU does not have.
    """
    try:
        return import_module("glm52._kernels")
    except ModuleNotFoundError:
        logger.warning(
            "native kernels are not built: the reference operators run instead, slower; install a C++ compiler and run "
            "pip install again"
        )
        return None
    except ImportError as error:
        raise ConfigError(f"native kernels: {error}; GLM52_BACKEND=reference does without") from error
