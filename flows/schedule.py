"""Schedule: a local Prefect server with its pages, and all flows on the cron lines of settings.ini, on one machine.

    python flows/schedule.py              server at 127.0.0.1:4200, flows served until Ctrl-C
    python flows/schedule.py --port 4300  another port
    python flows/schedule.py --serve      only serve, with the server that PREFECT_API_URL names

What is served and dies is started again. For workers on other machines there is prefect.yaml.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import common  # noqa: F401  (Prefect kept quiet)
from common import settings

from calling_ai.operate.schedule import FLOWS

HERE = Path(__file__).resolve().parent


def serve() -> None:
    """Serve every flow whose cron line is not empty, one run of each at a time."""
    import prefect
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

    crons = {name: getattr(settings().schedules, name) for name in FLOWS}
    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    deployments = [
        getattr(importlib.import_module(name), name).to_deployment("scheduled", cron=cron, concurrency_limit=one)
        for name, cron in crons.items()
        if cron
    ]
    prefect.serve(*deployments, limit=2, pause_on_shutdown=False)


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until the server answers."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return
        time.sleep(0.3)
    raise SystemExit(f"error: the server at {url} does not answer; is its port taken?")


def stop(process: subprocess.Popen[bytes] | None) -> None:
    """End a process that was started here."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(port: int) -> None:
    """Run server and flows until somebody ends it."""
    address = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {"PREFECT_API_URL": address}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    pages = os.environ | {"PREFECT_SERVER_UI_API_URL": address}
    server = subprocess.Popen(command, env=pages, stdout=subprocess.DEVNULL)
    flows: subprocess.Popen[bytes] | None = None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        wait_for(address, server)
        print(f"pages: http://127.0.0.1:{port}", flush=True)
        for name in FLOWS:
            cron = getattr(settings().schedules, name)
            print(f"  {name:<8} {cron or 'never'}", flush=True)
        while server.poll() is None:
            if flows is None or flows.poll() is not None:
                flows = subprocess.Popen([sys.executable, str(HERE / "schedule.py"), "--serve"], env=environment)
            time.sleep(1)
        raise SystemExit("error: the server has ended")
    except KeyboardInterrupt:
        print("ending", flush=True)
    finally:
        stop(flows)
        stop(server)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=4200, help="of the server, on 127.0.0.1")
    parser.add_argument("--serve", action="store_true", help="only serve, with the server that PREFECT_API_URL names")
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
    else:
        run(arguments.port)
