"""What a reader sees, exactly: many small inputs of every text format."""

from __future__ import annotations

import pytest

from retrievers.loaders.html import html_to_text
from retrievers.loaders.markdown import markdown_to_text

_HTML = {
    "item of a paragraph": ("<ul><li><p>Close.</p></li><li><p>Go.</p></li></ul>", "- Close.\n- Go."),
    "numbers": ("<ol start=3><li>a<li value=9>b<li>c</ol>", "3. a\n9. b\n10. c"),
    "letters backwards": ("<ol type=a reversed><li>x<li>y</ol>", "b. x\na. y"),
    "nested list": ("<ol><li>a<ul><li>b</ul><li>c</ol>", "1. a\n  - b\n2. c"),
    "empty item": ("<ul><li></li><li>x</li></ul>", "- x"),
    "code in an item": ("<ul><li>x<pre>a\n b</pre></ul>", "- x\n      a\n       b"),
    "cells in a form": (
        "<table><tr><form><td>Serial</td><td>SN-4711</td></form></tr></table>",
        "Serial | SN-4711",
    ),
    "words in a cell": ("<table><tr><td>P<b>ar</b>t<td>1<br>2</table>", "Part | 1 2"),
    "head and body": (
        "<table><caption>C</caption><thead><tr><th>a<th>b</thead><tr><td>1<td>2</table>",
        "C\na | b\n1 | 2",
    ),
    "spanned rows": (
        "<table><tr><td rowspan=2>P<td>1<tr><td>2<tr><td>Q<td>3</table>",
        "P | 1\nP | 2\nQ | 3",
    ),
    "spanned columns": ("<table><tr><td colspan=2>w<td>x</table>", "w | | x"),
    "empty cell": ("<table><tr><td>a<td><td>c</table>", "a | | c"),
    "table in a table": (
        "<table><tr><td>out<table><tr><td>a<td>b</table></table>", "out\n\na | b"
    ),
    "code in a cell": (
        "<table><tr><td><pre>1\n2</pre><td><pre>def f():\n  x</pre></table>",
        "    1\n    2\n\n    def f():\n      x",
    ),
    "cells alone": ("<td>a</td><td>b</td>", "a | b"),
    "breaks in code": ("<pre>a<br>b<div>c</div>d</pre>", "    a\n    b\n    c\n    d"),
    "choices": ("<select><option>Red<option>Green</select>", "Red\nGreen"),
    "buttons": ("<button>A</button><button>B</button>", "A B"),
    "filled in": ("S<input value='SN 1'><input type=hidden value=no>", "S SN 1"),
    "terms": ("<dl><dt>T<dd>D<dt>U<dd>E</dl>", "T\nD\nU\nE"),
    "raised and lowered": (
        "10<sup>-3</sup> H<sub>2</sub>O 2<sup>nd</sup> a<sup><a>[1]</a></sup> 10<sup>1.5</sup>",
        "10⁻³ H₂O 2nd a[1] 10^1.5",
    ),
    "ruby": ("<ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp></ruby>", "漢(かん)"),
    "fraction": ("<math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>", "1/2"),
    "hidden": ("<p hidden>a<p style='color:red; display: none'>b<p>c", "c"),
    "styled as a block": ("a<span style='display:block'>b</span>c", "a\n\nb\n\nc"),
    "picture": ("<img alt='A pump'>", "A pump"),
    "drawing": ("<svg><title>i</title><text>A</text><text>B</text></svg>", "A B"),
    "soft hyphen, break, space": ("infor&shy;ma<wbr>tion a&nbsp;b", "information a b"),
    "part of a word": ("un<i>believ</i>able", "unbelievable"),
    "old tags": ("<center>a</center><menu><li>b</menu>", "a\n\n- b"),
    "NUL": ("a\0b", "ab"),
}  # fmt: skip


@pytest.mark.parametrize("name", _HTML)
def test_html_is_read_as_a_browser_shows_it(name: str) -> None:
    markup, expected = _HTML[name]
    assert html_to_text(markup)[0] == expected


_MARKDOWN = {
    "break in a cell": ("| a | b |\n|---|---|\n| c<br>d | 22<br>443 |", "a | b\nc d | 22 443"),
    "break in a paragraph": ("A<br>B<br/>C", "A\nB\nC"),
    "placeholder": ("Run --token <token> on <zone-name>.", "Run --token <token> on <zone-name>."),
    "placeholder that begins a block": ("<host-name>\nis it.", "<host-name> is it."),
    "placeholder called like a tag": ("cp <source> <title>", "cp <source> <title>"),
    "block called like a tag": ("<title>\nis it.", "<title> is it."),
    "type": ("Vec<String> List<A> Map<K, List<int>>", "Vec<String> List<A> Map<K, List<int>>"),
    "code span": ("`Vec<String>` `<b>`", "Vec<String> <b>"),
    "escaped": ("\\<esc> &lt;tok&gt; a < b > c", "<esc> <tok> a < b > c"),
    "real tags": ("Press <kbd>F1</kbd> and <b>wa</b>it.", "Press F1 and wait."),
    "comment": ("a <!-- b <c> --> d", "a d"),
    "details": ("<details>\n<summary>S</summary>\n\n- a\n\n</details>", "S\n\n- a"),
    "two rules": ("---\n\nKeep shut.\n\n---\n\n# M", "Keep shut.\n\nM"),
    "heading between rules": ("---\n# W\n\nNever open.\n\n---\nMore.", "W\n\nNever open.\n\nMore."),
    "sentence between rules": ("---\nNever open it: hot\n---\nx", "Never open it: hot\n\nx"),
    "TOML": ("+++\ntitle = 'X'\n+++\nBody", "Body"),
    "YAML": ("---\ntitle: X\ntags:\n  - a\n---\nBody", "Body"),
    "front matter that is empty": ("---\n---\nBody", "Body"),
    "note of one word": ("a[^n].\n\n[^n]: Hot", "a^n.\n\n[^n]: Hot"),
    "note of more": ("a[^n].\n\n[^n]: Hot lid", "a[^n].\n\n[^n]: Hot lid"),
    "lines of a paragraph": ("a\nb  \nc", "a b\nc"),
    "fence in an item": ("- a\n  ```\n  b\n   c\n  ```", "- a\n      b\n       c"),
    "list behind a number": ("3) a\n4) b\n   - c", "3. a\n4. b\n  - c"),
    "carriage returns": ("# a\r\rb", "a\n\nb"),
}  # fmt: skip


@pytest.mark.parametrize("name", _MARKDOWN)
def test_markdown_is_read_as_it_is_rendered(name: str) -> None:
    markup, expected = _MARKDOWN[name]
    assert markdown_to_text(markup)[0] == expected
