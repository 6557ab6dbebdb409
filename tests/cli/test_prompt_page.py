"""The page of one prompt: whole, offline, and alive in a real browser where there is one."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from paperworks.cli import inspect
from paperworks.cli.prompt_page import MOST_TOKENS, page
from paperworks.interpret.lenses.prompt_view import prompt_view
from paperworks.models.presets.families import llama

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</script><script>document.title='hijacked'</script>"


class Tokenizer:
    def encode(self, text):
        return [ord(letter) % 60 for letter in text]

    def decode(self, ids):
        return NASTY if ids == [3] else " " if ids == [4] else f"<{ids[0]}>"


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = llama(32, 3, 4, 48, vocab_size=60).build().eval()
    net.tokenizer = Tokenizer()
    return net


def written(model, tokens):
    view = prompt_view(model, torch.tensor(tokens))
    return page(view, lambda token: model.tokenizer.decode([token]), "a <model>", "words & more")


def test_the_page_is_one_file_that_asks_for_nothing(model):
    html = written(model, [3, 4, 5, 6])
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", html)
    assert "a &lt;model&gt;" in html
    assert NASTY not in html
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["tokens"] == [NASTY, " ", "<5>", "<6>"]
    assert len(data["effects"]) == len(data["components"])
    assert len(data["lens"]["tokens"]) == 4  # the embedding and three blocks
    assert not re.search(r"\$(title|about|data)|\$\$", html)  # no place-holder is left


def test_a_command_writes_it(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(inspect, "load_model", lambda name: model)
    assert inspect.main(["tiny", "hello", "--out", str(tmp_path / "deep/page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    assert "tiny: one prompt" in (tmp_path / "deep/page.html").read_text()


def test_texts_that_do_not_fit_and_models_without_tokenizer_are_refused(model, monkeypatch, tmp_path):
    monkeypatch.setattr(inspect, "load_model", lambda name: model)
    with pytest.raises(ValueError, match=f"a page holds 1 to {MOST_TOKENS}"):
        inspect.main(["tiny", "x" * (MOST_TOKENS + 1), "--out", str(tmp_path / "page.html")])
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        inspect.main(["tiny", "hello", "--out", str(tmp_path / "page.html")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_it_and_answers_to_clicks(model, tmp_path):
    html = written(model, [3, 4, 5, 6])
    # what a click must do is asked of the page itself, and its answer left in the document
    probe = """<script>
      const out = { title: document.title, tokens: document.querySelectorAll("#tokens .token").length,
        heads: document.querySelectorAll("#heads canvas").length, cells: document.querySelectorAll("#lens td").length,
        before: document.querySelector("#next-title").textContent };
      document.querySelectorAll("#tokens .token")[2].click();
      out.after = document.querySelector("#next-title").textContent;
      const slider = document.querySelector("#block"); slider.value = 2; slider.dispatchEvent(new Event("input"));
      out.block = document.querySelector("#block-name").textContent;
      out.bars = document.querySelectorAll("#parts .track").length;
      const pre = document.createElement("pre"); pre.id = "probe"; pre.textContent = JSON.stringify(out);
      document.body.append(pre);
    </script></body>"""
    (tmp_path / "page.html").write_text(html.replace("</body>", probe), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
               f"file://{tmp_path / 'page.html'}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(
        re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)[1].replace("&lt;", "<").replace("&gt;", ">")
    )
    assert found["title"] == "a <model>"
    assert found["tokens"] == 4
    assert found["heads"] == 4
    assert found["cells"] == 5 * 4  # a heading, the embedding and three blocks
    assert "<6>" in found["before"]
    assert "<5>" in found["after"]
    assert found["block"] == "2"
    assert found["bars"] == 12
