"""A process that uses a pool, as ComfyUI does; tests run it as a program, read what it says, and kill it.

    python pool_client.py CHECKPOINT WORKERS MODE [FOLDER]

MODE is once, idle, busy, starting, forked or leaving: the last ends at SIGUSR1, while a thread waits for a forward. It
prints one line of JSON when it is there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.checkpoint.header import read_header

import testkit  # noqa: F401 (registers wan_parallel)
from testkit import tiny


def main(checkpoint: str, workers: str, mode: str, folder: str = "") -> None:
    if folder:
        sys.path.insert(0, folder)  # as custom nodes do
    pool = acquire(PoolSettings(ParallelPlan(int(workers)), device="cpu"))
    spec, config = ModelSpec(checkpoint, "fp32", "fp32"), read_header(checkpoint).config

    def say(**more: object) -> None:
        print(json.dumps({"launcher": pool.launcher_pid, "workers": pool.worker_pids, **more}), flush=True)

    def say_and_wait() -> None:
        say()
        time.sleep(600)

    def busy() -> None:
        said = []

        def poll() -> None:
            if not said:
                said.append(say())

        while True:
            pool.forward(spec, *tiny.inputs(config, (6, 60, 60)), poll=poll)

    if mode == "starting":
        pool.ensure_ready(spec, poll=say_and_wait)
    out = pool.forward(spec, *tiny.inputs(config))
    if mode == "leaving":
        asked = threading.Event()
        signal.signal(signal.SIGUSR1, lambda *_signal: asked.set())
        threading.Thread(target=busy, daemon=True).start()
        asked.wait()
        return
    if mode == "busy":
        busy()
    if mode == "forked":
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        say(child=child)
        time.sleep(600)
    say(sum=float(out.double().sum()))
    if mode == "idle":
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
