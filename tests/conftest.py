"""Pipelines that test files share."""

import pytest

from dit_probe import testing
from dit_probe.anatomy import families


@pytest.fixture(scope="session")
def pipelines():
    """Tiny pipelines by family and variant, made once; tests that change one make their own."""
    made = {}

    def pipeline(family, variant=None):
        key = family, variant or families()[family].variants[0]
        if key not in made:
            made[key] = testing.tiny_pipeline(*key)
        return made[key]

    return pipeline
