"""Model names as Ollama writes them: ``[scheme://][host/][namespace/]model[:tag]``.

Every part is checked when a name is made, so a ``ModelName`` can safely become a path or a URL.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from tars_jax.errors import InvalidRequest

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

_WORD = "[A-Za-z0-9_]"
_PART_PATTERNS = {  # ASCII only; a dot is no namespace character, a colon (port) only a host's
    "host": re.compile(rf"{_WORD}[A-Za-z0-9_.:-]{{0,349}}"),
    "namespace": re.compile(rf"{_WORD}[A-Za-z0-9_-]{{0,79}}"),
    "model": re.compile(rf"{_WORD}[A-Za-z0-9_.-]{{0,79}}"),
    "tag": re.compile(rf"{_WORD}[A-Za-z0-9_.-]{{0,79}}"),
}


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """A complete model name.

    Raises:
        InvalidRequest: "invalid model name" when a part is empty, too long or has a forbidden character.
    """

    host: str = DEFAULT_HOST
    namespace: str = DEFAULT_NAMESPACE
    model: str
    tag: str = DEFAULT_TAG

    def __post_init__(self) -> None:
        for part, pattern in _PART_PATTERNS.items():
            if not pattern.fullmatch(getattr(self, part)):
                raise InvalidRequest("invalid model name")

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """The name ``text`` stands for; missing parts get Ollama's defaults, a scheme is dropped.

        Raises:
            InvalidRequest: "invalid model name".
        """
        parts: dict[str, str] = {}
        rest = text
        if rest.rfind(":") > rest.rfind("/"):  # a colon before the last slash belongs to a scheme or a port
            rest, _, parts["tag"] = rest.rpartition(":")
        before, slash, parts["model"] = rest.rpartition("/")
        if slash:
            host, slash, parts["namespace"] = before.rpartition("/")
            if slash:
                parts["host"] = host.split("://", 1)[-1]
        return cls(**parts)

    @property
    def parts(self) -> tuple[str, str, str, str]:
        return self.host, self.namespace, self.model, self.tag

    @property
    def path(self) -> PurePosixPath:
        """Where the manifest lies below ``manifests``."""
        return PurePosixPath(*self.parts)

    def folded(self) -> "ModelName":
        """The name in lower case: two names with equal ``folded()`` mean the same model."""
        return ModelName(host=self.host.lower(), namespace=self.namespace.lower(), model=self.model.lower(), tag=self.tag.lower())

    def short(self) -> str:
        """The display name: default host and namespace dropped, the tag always shown."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{name}"
        return name if self.namespace.lower() == DEFAULT_NAMESPACE else f"{self.namespace}/{name}"

    def __str__(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
