"""A judge's server in a process of its own, which the killed runs ask: the longer answer is better. Prints its address."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "online"))

from chat_server import ChatServer, longer_is_better

with ChatServer(longer_is_better) as server:
    print(server.base_url, flush=True)
    threading.Event().wait()
