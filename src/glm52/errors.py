"""The exceptions of the package: one small tree, so that callers can catch as wide or as narrow as they need.

    GLMError
    ├── ConfigError        a config.json that does not describe a model this package runs
    ├── CheckpointError    tensors that are missing, damaged, mis-shaped or unaccounted for
    ├── PlanError          a goal that no placement on this hardware can meet
    ├── CapacityError      a cache or a queue that is too small for what was asked
    └── RequestError       a request that is wrong; carries the HTTP status and the name of the field
        └── ContextOverflow    its prompt is longer than the model can hold

Shapes and dtypes that are wrong at the border to the kernels raise ``ValueError``.
"""


class GLMError(Exception):
    """Root of every error this package raises on purpose. The message says what, where and what to do."""


class ConfigError(GLMError):
    """The configuration is missing a key, contradicts itself or describes another architecture."""


class CheckpointError(GLMError):
    """A checkpoint folder cannot be trusted: damaged, incomplete or not this model."""


class PlanError(GLMError):
    """No placement of this model on this hardware meets the goal."""


class CapacityError(GLMError):
    """A fixed resource (cache rows, queue slots) is smaller than the work needs."""


class RequestError(GLMError):
    """A request is wrong.

    status: HTTP status that a server answers with. param: the field at fault. code: a stable machine-readable name.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class ContextOverflow(RequestError):
    """A prompt longer than the model can hold; every dialect has its own words for it. field: where it was given."""

    def __init__(self, prompt_tokens: int, limit: int, field: str) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your {field} resulted in "
            f"{prompt_tokens} tokens. Please reduce the length of the {field}.",
            param=field, code="context_length_exceeded",
        )  # fmt: skip
        self.prompt_tokens, self.limit = prompt_tokens, limit
