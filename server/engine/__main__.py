"""`python -P -m coserve.server.engine --settings FILE`: the engine process, started by the supervisor.

Exit codes: 0 drained, 2 usage, 3 model refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from pathlib import Path

from coserve.server.wire.lifeline import start_heartbeat, watch_lifeline

_SIGTERM_GRACE = 5.0  # the gateway has drained its streams by then


def main() -> int:
    parser = argparse.ArgumentParser(prog="coserve.server.engine")
    parser.add_argument("--settings", type=Path, required=True, help="the settings file the supervisor has written")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    watch_lifeline()

    from coserve.server.engine.load import ModelRefused
    from coserve.server.engine.options import EngineOptions
    from coserve.server.engine.start import build_engine

    try:
        options = EngineOptions.read(arguments.settings)
        logging.getLogger().setLevel(options.log_level.upper())
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        print(f"the settings file {arguments.settings} cannot be used: {error}", file=sys.stderr)
        return 2
    heartbeat = start_heartbeat()
    try:
        engine, intake = build_engine(options, heartbeat)
    except ModelRefused as error:
        heartbeat.last_words(str(error))
        print(f"model refused: {error}", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: intake.begin_drain(_SIGTERM_GRACE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides
    engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
