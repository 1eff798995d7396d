"""The image of deploy/Dockerfile, performed once for all tests that look at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.proxy import Proxy
from tests.deploy import tools
from tests.deploy.rehearsal import Room, Unavailable, rehearsed
from tests.postgres import Cluster

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """The last stage of the Dockerfile: as its user, with its environment, and with a read-only root."""
    try:
        with rehearsed(ROOT / "deploy/Dockerfile", ROOT, tmp_path_factory.mktemp("image")) as done:
            done.image.mount(ROOT / "examples", "/app/examples")
            done.image.seal()
            yield done.image
    except Unavailable as reason:
        tools.unavailable(str(reason))


@pytest.fixture
def tcp_url(cluster: Cluster) -> Iterator[str]:
    """A database without the schema that can be reached by address: an image's user may not use the server's socket."""
    with cluster.database(template=None) as url, Proxy(cluster) as proxy:
        yield proxy.url(url.partition("?")[0].rpartition("/")[2])
