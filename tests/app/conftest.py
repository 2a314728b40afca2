"""What tests of the commands share: a tiny run, and a cache of their own."""

import pytest
import tiny_runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of few images; a file that needs another one has its own."""
    return tiny_runs.train(tmp_path_factory.mktemp("runs")).resolve()


@pytest.fixture(scope="module")
def no_cache(tmp_path_factory):
    """Nothing that was kept of real images before: `pytest.mark.usefixtures("no_cache")`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
