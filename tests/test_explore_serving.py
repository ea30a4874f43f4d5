"""Who may see the explorer, and the command that serves it."""

from __future__ import annotations

import http.client
import queue
import subprocess
import sys
import threading

import explore_cases as cases
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe.cli import app as cli

pytest.importorskip("dash", reason="needs Dash: pip install 'dit-probe[explore]'")

import werkzeug.serving

from dit_probe.explore import app, serving


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return cases.trace(tmp_path_factory.mktemp("store") / "run.zarr", samples=1)


def test_an_address_elsewhere_needs_the_token(path):
    application = app(path)
    serving.guard(application.server, "secret")
    client = application.server.test_client()
    for place in ("/", "/_dash-layout", "/_dash-dependencies", "/assets/explorer.css", "/?token=wrong", "/?token="):
        assert client.get(place).status_code == 401, place
    assert client.post("/_dash-update-component", json={}).status_code == 401
    first = client.get("/?token=secret")
    assert first.status_code == 302 and first.headers["Location"] == "/"
    assert "HttpOnly" in first.headers["Set-Cookie"] and "SameSite=Strict" in first.headers["Set-Cookie"]
    assert client.get("/").status_code == client.get("/_dash-layout").status_code == 200


def test_foreign_names_of_this_machine_are_refused(path):
    application = app(path)
    serving.guard(application.server, None, hosts=serving.LOOPBACK)
    client = application.server.test_client()
    assert client.get("/", base_url="http://evil.example:8050").status_code == 403
    for name in ("127.0.0.1:8050", "localhost:8050", "[::1]:8050", "localhost"):
        assert client.get("/", base_url=f"http://{name}").status_code == 200
    policy = client.get("/", base_url="http://localhost").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe-eval" not in policy


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_what_is_served_answers_until_it_is_ended(path, monkeypatch, host):
    make, made, said = werkzeug.serving.make_server, queue.SimpleQueue(), queue.SimpleQueue()

    def remembered(*arguments, **options):
        made.put(server := make(*arguments, **options))
        return server

    monkeypatch.setattr(werkzeug.serving, "make_server", remembered)
    serving_it = threading.Thread(
        target=serving.serve, args=[path], kwargs={"host": host, "port": 0, "announce": said.put}, daemon=True
    )
    serving_it.start()
    address, _, token = said.get(timeout=20).partition("?token=")
    assert address.startswith(f"http://{host}:") and len(token) == (0 if host == "127.0.0.1" else 32)
    here = http.client.HTTPConnection("127.0.0.1", int(address.rstrip("/").rpartition(":")[2]), timeout=20)
    try:
        found = []
        for at in ("/", f"/?token={token}"):
            here.request("GET", at)
            with here.getresponse() as response:
                found.append(response.status)
                response.read()
        assert found == ([200, 200] if not token else [401, 302])
    finally:
        here.close()
        made.get(timeout=20).shutdown()
        serving_it.join(timeout=20)
    assert not serving_it.is_alive()


def test_a_port_that_is_taken_is_an_error_of_one_line(path):
    with (
        serving._bound("127.0.0.1", 0) as taken,
        pytest.raises(serving.ServingError, match="cannot listen on .* Choose another port"),
    ):
        serving.serve(path, port=taken.getsockname()[1])


def test_the_page_needs_dash_only_when_it_is_made():
    code = (
        "import sys; sys.modules['dash'] = None\n"
        "import dit_probe as dp, dit_probe.errors\n"
        "dp.explore.page\n"
        "try: dp.explore.app\n"
        "except dit_probe.errors.DitProbeError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "dit-probe[explore]"' in found.stdout


# --- The command


def test_the_command_serves_what_it_is_told(path, tmp_path, monkeypatch):
    asked: list = []

    def serve(*arguments, **options):
        asked.append((arguments, options))
        options["announce"]("http://127.0.0.1:1/")

    monkeypatch.setattr(dp.explore, "serve", serve)
    Image.fromarray(np.eye(4, dtype=np.uint8) * 9).save(tmp_path / "mask.png")
    mask = f"a=b={tmp_path / 'mask.png'}"
    result = CliRunner().invoke(cli, ["explore", str(path), "other.zarr", "--port", "0", "--mask", mask])
    assert result.exit_code == 0, result.output
    assert "http://127.0.0.1:1/" in result.output and "Ctrl+C" in result.output
    (arguments, options), masks = asked[0], asked[0][1].pop("masks")
    assert arguments == (str(path), "other.zarr") and masks["a=b"].tolist() == np.eye(4, dtype=bool).tolist()
    assert (options["host"], options["port"], options["token"]) == ("127.0.0.1", 0, None)


def test_a_wrong_call_is_one_message(path, tmp_path):
    for arguments, words in (
        (["explore", str(tmp_path / "nowhere.zarr")], "nowhere.zarr"),
        (["explore", str(path), "--mask", "sun=nowhere.png"], "CONCEPT=FILE"),
        (["report", str(tmp_path / "nowhere.zarr")], "nowhere.zarr"),
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2 and words in result.stderr.replace("\n", "") and "Traceback" not in result.output
