"""Text of a page in the making: words run into lines, lines into blocks, cells into rows."""

from __future__ import annotations

from dataclasses import dataclass, field

# A spanned cell is repeated or padded this often at most; a hostile page names millions.
_MAX_SPAN = 100
# Above this a cell of several paragraphs is part of a layout, not a value.
_MAX_VALUE_CHARS = 400


@dataclass(kw_only=True, slots=True)
class _List:
    """An open list: its next number, the step to the one after, ``None`` for bullets."""

    number: int | None
    step: int
    style: str


@dataclass(kw_only=True, slots=True)
class _Cell:
    """A closed table cell."""

    blocks: list[list[str]]
    is_layout: bool
    columns: int = 1
    rows: int = 1

    @property
    def value(self) -> str:
        return " ".join(line.strip() for block in self.blocks for line in block)


@dataclass(kw_only=True, slots=True)
class _Row:
    cells: list[_Cell] = field(default_factory=list)


class _Flow:
    """Lines and blocks of the page or of one cell."""

    def __init__(self) -> None:
        self.blocks: list[list[str]] = [[]]
        self.words: list[str] = []
        self.lists: list[_List] = []
        self.marker = ""
        self.is_layout = False


class PageText:
    """Collects the text of a page in the order it is read.

    Blocks are parted by blank lines; the items of a list and the rows of a table stay together.
    Whitespace collapses as in a browser, except between :meth:`open_code` and :meth:`close_code`.
    """

    def __init__(self) -> None:
        self._flows = [_Flow()]
        self._rows: list[_Row | None] = [None]
        # Column of a table to a cell that reaches down into the next rows; one level a table.
        self._spanning: list[dict[int, _Cell]] = [{}]
        self._code_depth = 0

    @property
    def _flow(self) -> _Flow:
        return self._flows[-1]

    def add(self, words: str) -> None:
        """Add inline text."""
        self._flow.words.append(words)

    def end_line(self) -> None:
        """End the line where there is one."""
        flow = self._flow
        if self._code_depth:
            if flow.words and not flow.words[-1].endswith("\n"):
                flow.words.append("\n")
            return
        if (row := self._rows[-1]) is not None:
            self._loose_cell(row)
            return
        text = " ".join("".join(flow.words).split())
        flow.words.clear()
        if not text:
            return
        if flow.lists:
            indent = "  " * (len(flow.lists) - 1)
            text = f"{indent}{flow.marker or '  '}{text}"
            flow.marker = ""
        flow.blocks[-1].append(text)

    def break_line(self) -> None:
        """End the line; inside preformatted text an empty one too."""
        if self._code_depth:
            self._flow.words.append("\n")
        else:
            self.end_line()

    def end_block(self) -> None:
        """End the line and, outside of lists, the paragraph."""
        self.end_line()
        flow = self._flow
        if flow.blocks[-1] and not flow.lists and not self._code_depth:
            flow.blocks.append([])

    def open_code(self) -> None:
        """Begin preformatted text; it is indented by four blanks."""
        if not self._code_depth:
            self.end_block()
        self._code_depth += 1

    def close_code(self) -> None:
        """End preformatted text."""
        self._code_depth -= 1
        if self._code_depth:
            return
        flow = self._flow
        flow.is_layout = True
        code = "".join(flow.words).expandtabs(4).strip("\n")
        flow.words.clear()
        if code.strip():
            if flow.marker:
                flow.blocks[-1].append("  " * (len(flow.lists) - 1) + flow.marker.rstrip())
                flow.marker = ""
            margin = "    " + "  " * len(flow.lists)
            flow.blocks[-1].extend(
                margin + line.rstrip() if line.strip() else "" for line in code.split("\n")
            )
        self.end_block()

    def open_list(self, number: int | None, step: int = 1, style: str = "1") -> None:
        """Begin a list.

        Parameters
        ----------
        number : int or None
            Of the first item, ``None`` for bullets.
        step : int
            From one number to the next.
        style : str
            ``"1"``, ``"a"``, ``"A"``, ``"i"`` or ``"I"``.
        """
        if self._flow.lists:
            self.end_line()
        else:
            self.end_block()
        self._flow.lists.append(_List(number=number, step=step, style=style))

    def close_list(self) -> None:
        """End the innermost list."""
        self.end_line()
        self._flow.marker = ""
        self._flow.lists.pop()
        self.end_block()

    def open_item(self, number: int | None = None) -> None:
        """Begin an item; `number` sets its number and those after it."""
        self.end_line()
        flow = self._flow
        if not flow.lists or self._code_depth:
            flow.words.append("- ")
            return
        innermost = flow.lists[-1]
        if innermost.number is None:
            flow.marker = "- "
            return
        if number is not None:
            innermost.number = number
        flow.marker = f"{_numeral(innermost.number, innermost.style)}. "
        innermost.number += innermost.step

    def open_table(self) -> None:
        """Begin a table; the rows of an outer one wait."""
        self.end_block()
        self._flow.is_layout = True
        self._rows.append(None)
        self._spanning.append({})

    def close_table(self) -> None:
        """End the innermost table."""
        self.close_row()
        self._rows.pop()
        self._spanning.pop()
        self.end_block()

    def open_row(self) -> None:
        """Begin a row; one that is still open ends here."""
        self.close_row()
        self.end_line()
        self._rows[-1] = _Row()

    def close_row(self) -> None:
        """End the row: one line of values, or blocks where its cells lay out a page."""
        row = self._rows[-1]
        if row is None:
            return
        self._loose_cell(row)
        self._rows[-1] = None
        flow = self._flow
        if any(cell.is_layout for cell in row.cells):
            self.end_block()
            for cell in row.cells:
                flow.blocks.extend(block for block in cell.blocks if block)
            flow.blocks.append([])
            return
        values = self._values(row)
        if any(values):
            while not values[-1]:
                values.pop()
            flow.words.append(" | ".join(values))
            self.end_line()

    def open_cell(self) -> None:
        """Begin a cell; a cell outside of a row begins one."""
        if self._rows[-1] is None:
            self.open_row()
        row = self._rows[-1]
        assert row is not None
        self._loose_cell(row)
        self._flows.append(_Flow())
        self._rows.append(None)

    def close_cell(self, columns: int = 1, rows: int = 1) -> None:
        """End a cell that spans `columns` and `rows`."""
        self.close_row()
        self.end_block()
        self._rows.pop()
        flow = self._flows.pop()
        row = self._rows[-1]
        assert row is not None
        rest = " ".join("".join(flow.words).split())  # of a cell inside preformatted text
        blocks = [block for block in [*flow.blocks, [rest] if rest else []] if block]
        if len(blocks) > 1 and sum(len(line) for block in blocks for line in block) > (
            _MAX_VALUE_CHARS
        ):
            flow.is_layout = True
        row.cells.append(
            _Cell(
                blocks=blocks,
                is_layout=flow.is_layout,
                columns=min(max(columns, 1), _MAX_SPAN),
                rows=min(max(rows, 1), _MAX_SPAN),
            )
        )

    def text(self) -> str:
        """Everything collected."""
        self.close_row()
        self.end_block()
        return "\n\n".join("\n".join(block) for block in self._flow.blocks if block)

    def _loose_cell(self, row: _Row) -> None:
        """Keep text that stands in a row beside its cells."""
        text = " ".join("".join(self._flow.words).split())
        self._flow.words.clear()
        if text:
            row.cells.append(_Cell(blocks=[[text]], is_layout=False))

    def _values(self, row: _Row) -> list[str]:
        """Values by column; a cell that spans rows is repeated, for each row to stand alone."""
        spanning = self._spanning[-1]
        values: list[str] = []

        def take_spanning() -> None:
            while (cell := spanning.get(len(values))) is not None:
                cell.rows -= 1
                if cell.rows <= 1:
                    del spanning[len(values)]
                values.append(cell.value)

        for cell in row.cells:
            take_spanning()
            if cell.rows > 1:
                spanning[len(values)] = cell
            values.append(cell.value)
            values.extend([""] * (cell.columns - 1))
        take_spanning()
        return values


_ROMAN = (
    (1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"),
    (50, "l"), (40, "xl"), (10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"),
)  # fmt: skip


def _numeral(number: int, style: str) -> str:
    numeral = ""
    if style in "aA" and number > 0:
        while number:
            number, digit = divmod(number - 1, 26)
            numeral = chr(97 + digit) + numeral
    elif style in "iI" and 0 < number < 4000:
        for value, sign in _ROMAN:
            count, number = divmod(number, value)
            numeral += sign * count
    else:
        return str(number)
    return numeral.upper() if style.isupper() else numeral
