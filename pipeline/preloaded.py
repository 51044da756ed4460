"""What the fork server imports, so that its workers have it: for it alone to import, see forking.py."""

from __future__ import annotations

import gc
import os
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's, which ends its workers
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

for name in ("PYTHONPATH", "PYTHONSAFEPATH"):  # these imports find their modules by them, and nothing later shall
    os.environ.pop(name, None)

gc.disable()  # nothing of what is imported is garbage, and to look for it takes a sixth of the time
import distributed.nanny  # noqa: E402, F401
import distributed.worker  # noqa: E402, F401

import pipeline.finishing  # noqa: E402, F401
import pipeline.segmentation  # noqa: E402, F401
from pipeline import openvino_graph  # noqa: E402
from pipeline.machine import has_gpu  # noqa: E402

if openvino_graph.installed() and not has_gpu():
    openvino_graph.import_openvino()

gc.freeze()  # and no worker need look at it either, which would give each its own copy of what they share
gc.enable()
