"""Network namespaces for tests: the kit's, and where none can be made, the test is skipped."""

from __future__ import annotations

from typing import Self

import pytest

from guestkit import namespaces
from guestkit.namespaces import IFF_UP
from guestkit.progress import SetupError

__all__ = ["IFF_UP", "Namespace"]


class Namespace(namespaces.Namespace):
    """See the kit's."""

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except SetupError as error:
            pytest.skip(str(error))
