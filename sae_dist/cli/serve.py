"""Runs, their members and sweeps for a team: one page in a browser that follows them, with links to pages and reports.

It is on the loopback unless host= says otherwise, has no password, and shows feature pages, feature data, reports and
figures alone: no configuration, checkpoint, dictionary or text can be read through it. Ctrl-C ends it.
Examples: sae-dist serve runs
          sae-dist serve s3://bucket/runs port=8000
"""

import sys
import threading
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from sae_dist.cli.serve_view import STATIC, Snapshots
from sae_dist.config import Stopped, frozen, load
from sae_dist.interpret import site
from sae_dist.service.shown_features import ShownFeatures
from sae_dist.service.shown_folder import shown_folder
from sae_dist.service.web_server import WebServer

POSITIONAL = ("out",)
RETRY_S = 15.0  # a storage that fails for longer does not answer
NO_PASSWORD = "warning: host={host} lets everybody who reaches {url} read the figures and pages: there is no password"


@frozen
class ServeConfig:
    """What to show, and where to listen."""

    out: str = "runs"  # the folder of a run, of a sweep or of several, four folders deep; or s3://bucket/prefix
    host: str = "127.0.0.1"  # the address to listen at; 0.0.0.0 is every one of this machine. There is no password
    port: Annotated[int, Field(ge=0, le=65535)] = 8420  # 0: a free one


CONFIG = ServeConfig


def main(values: Mapping[str, Any]) -> int:
    config = load(ServeConfig, values)
    folder = shown_folder(config.out, retry_s=RETRY_S)
    beside = {
        "site.css": (site.STATIC / "site.css").read_bytes(),
        "serve.css": (STATIC / "serve.css").read_bytes(),
        "serve.js": (STATIC / "serve.js").read_bytes(),
    }
    features = ShownFeatures(folder)
    page = Snapshots(folder, features, retry_s=RETRY_S)
    try:
        with WebServer(config.host, config.port, folder=folder, page=page, beside=beside, made=features) as server:
            if not server.is_private:
                print(NO_PASSWORD.format(host=config.host, url=server.url), file=sys.stderr)
            print(f"{folder.uri}: {server.url}\nCtrl-C ends it", flush=True)
            threading.Thread(target=page.read_ahead, name="read ahead", daemon=True).start()
            server.serve_forever()
    except (KeyboardInterrupt, Stopped):
        pass
    return 0
