"""The page of an autoencoder's features: whole, offline, and alive in a real browser where there is one."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from paperworks.cli import features
from paperworks.interpret import sae
from paperworks.models.presets.families import llama

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</script><b>"


class Tokenizer:
    def encode(self, text, bos=True):
        return [ord(letter) % 60 for letter in text]

    def decode(self, ids):
        return NASTY if ids == [3] else f"t{ids[0]}"


@pytest.fixture
def command(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = llama(32, 2, 4, 48, vocab_size=60).build().eval()
    model.tokenizer = Tokenizer()
    monkeypatch.setattr(features, "load_model", lambda name: model)
    sae.save(sae.TopK(latents=48, k=4).build(32), tmp_path / "sae", tap="blocks.0")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog? " * 40)

    def run(*more):
        given = ["tiny", "--sae", str(tmp_path / "sae"), "--text", str(tmp_path / "text.txt")]
        return features.main([*given, "--out", str(tmp_path / "page/features.html"), *more])

    run.model, run.page = model, tmp_path / "page/features.html"
    return run


def test_the_page_is_one_file_that_asks_for_nothing(command, capsys):
    assert command("--most", "10") == 0
    assert "features.html" in capsys.readouterr().out
    html = command.page.read_text()
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", html)
    assert NASTY not in html
    assert not re.search(r"\$(title|about|data)|\$\$", html)  # no place-holder is left
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert len(data["features"]) == 10
    assert all(feature["excerpts"] for feature in data["features"])
    assert "TopK, 48 latents of blocks.0" in html


def test_features_can_be_named_and_mistakes_are_told(command, tmp_path):
    command("--features", "3", "5")
    assert '"index":3' in command.page.read_text()
    with pytest.raises(ValueError, match="no latents \\[99\\]"):
        command("--features", "99")
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(ValueError, match="at least 128"):
        command()
    command.model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        command()
    config = tmp_path / "sae/cfg.json"
    config.write_text(config.read_text().replace('"hook_name": "blocks.0"', '"hook_name": null'))
    with pytest.raises(ValueError, match="--tap"):
        command()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_it_searches_and_follows_neighbours(command, tmp_path):
    command("--most", "48")
    probe = """<script>
      const buttons = () => [...document.querySelectorAll("#list button")];
      const out = { listed: buttons().length, first: document.querySelector("#feature h2").textContent,
        excerpts: document.querySelectorAll(".excerpt").length };
      buttons()[2].click(); out.third = document.querySelector("#feature h2").textContent;
      out.number = buttons()[2].querySelector("b").textContent;
      document.querySelector("#feature .row button").click();
      out.neighbour = document.querySelector("#feature h2").textContent;
      el("search").value = "no such token"; el("search").dispatchEvent(new Event("input")); out.none = buttons().length;
      const pre = document.createElement("pre"); pre.id = "probe"; pre.textContent = JSON.stringify(out);
      document.body.append(pre);
    </script></body>"""
    command.page.write_text(command.page.read_text().replace("</body>", probe), encoding="utf-8")
    given = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             f"file://{command.page}"]  # fmt: skip
    dom = subprocess.run(given, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)[1])
    assert found["listed"] > 3
    assert found["excerpts"] > 0
    assert found["third"] == f"Feature {found['number']}"
    assert found["neighbour"] != found["third"]
    assert found["none"] == 0
