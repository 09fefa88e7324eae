"""The mask microscope: what a stage keeps of its rows, and how the report shows them."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import test_report as parts
from small_tokenizers import byte_tokenizer

from align.core.card import TOKENS_FILE
from align.core.types import Example, TokenRow
from align.data.render.chat import ChatFormat
from align.data.render.templates import TEMPLATES
from align.data.token_view import plain, view_of, views
from align.report import build_report

CHAT = ChatFormat(byte_tokenizer(TEMPLATES["plain"]))


def test_a_plain_view_holds_every_token_with_its_state() -> None:
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "a"}]
    (view,) = views(Example(prompt=[], completion=turns, source="a:1"), CHAT)
    found = plain(view)
    assert (found["source"], found["side"]) == ("a:1", "row")
    # "User: é\nAssistant:\na</s>\n": one token a byte, é being two; the line break is not trained.
    assert found["counts"] == {"masked": 21, "trained": 1, "stop": 1}
    assert found["tokens"][6:9] == [["", "masked"], ["é", "masked"], ["\n", "masked"]]
    assert found["tokens"][-3:] == [["a", "trained"], ["</s>", "stop"], ["\n", "masked"]]


def test_of_a_long_row_the_turn_to_the_answer_and_its_end_are_kept() -> None:
    ids = tuple(CHAT.tokenizer("x" * 1000, add_special_tokens=False)["input_ids"])
    row = TokenRow((*ids, CHAT.stop_token_ids[0]), (False,) * 500 + (True,) * 501, "a:1")
    found = plain(view_of(row, CHAT, side="row"))
    assert found["counts"] == {"masked": 500, "trained": 500, "stop": 1}
    # 48 on both sides of the first trained one, and the last 8.
    assert [state for _, state in found["tokens"]] == [
        "left out",
        *["masked"] * 48,
        *["trained"] * 49,
        "left out",
        *["trained"] * 7,
        "stop",
    ]
    assert [n for n, state in found["tokens"] if state == "left out"] == [452, 444]


def test_the_report_shows_rows_token_by_token_and_stays_small(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    parts.write_run(run)
    turns = [
        {"role": "user", "content": "Is <b>1 & 2</b> a sum?"},
        {"role": "assistant", "content": "No.\nIt is two."},
    ]
    (view,) = views(Example(prompt=[], completion=turns, source="rows.jsonl:3"), CHAT)
    before = len(build_report(run).read_bytes())
    (run / "sft" / TOKENS_FILE).write_text(json.dumps([plain(view)]))
    html = build_report(run).read_text()
    section = html.partition("<h2>Token view</h2>")[2]
    section = section.partition("</section>")[0]
    assert "rows.jsonl:3 row" in section
    shown = section.partition("<pre>")[2].partition("</pre>")[0]
    # Each of the 15 bytes of the answer, its line break visible, and the stop with its sign.
    trained = re.findall(r"<b>(.*?)</b>", shown, re.DOTALL)
    assert "".join(trained) == "No.\u21b5\nIt is two."
    assert re.findall(r"<u>(.*?)</u>", shown) == ["&lt;/s&gt;\u2020"]
    masked = "".join(re.findall(r"<i>(.*?)</i>", shown, re.DOTALL))
    assert masked.startswith("User: Is &lt;b&gt;1 &amp; 2&lt;/b&gt; a sum?")
    assert len(html.encode()) - before < 2000
    # A file that another version wrote is no reason to have no report.
    (run / "sft" / TOKENS_FILE).write_text("{")
    assert "token by token" not in build_report(run).read_text()
