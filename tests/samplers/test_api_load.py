"""A thousand requests in flight: what the client costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import faulty_server

DRIVER = Path(__file__).parent / "load_driver.py"
MOST_CPU = 4.0  # milliseconds a request: twice what it takes on a quiet machine, openai's client most of it
MOST_MEMORY = 150.0  # MiB


@pytest.mark.slow
@pytest.mark.parametrize("count", [1_500, 20_000])
def test_a_thousand_requests_in_flight(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory does not grow with what was bought, and CPU for a request stays small. The figures are printed."""
    with faulty_server(latency=3, jitter=0.5) as server:
        options = {"base_url": server.base_url, "concurrency": 1000, "ledger": str(tmp_path / "ledger.sqlite")}
        (tmp_path / "options.json").write_text(json.dumps(options | {"account": "load"}))
        command = [sys.executable, str(DRIVER), str(tmp_path / "options.json"), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        stats = server.stats()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    cpu = found["cpu"] / count * 1000
    with capsys.disabled():
        print(
            f"\n{count} requests, {stats['most_in_flight']} in flight: {cpu:.2f} ms of CPU a request, "
            f"{count / found['seconds']:.0f} a second, {found['memory']:.0f} MiB more"
        )
    assert found["good"] == stats["served"] == count
    assert stats["most_in_flight"] > 500  # a slow machine sends the last ones when the first have come back
    assert cpu < MOST_CPU
    assert found["memory"] < MOST_MEMORY
