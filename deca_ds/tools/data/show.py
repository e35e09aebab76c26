"""Tables, a histogram and rendered sequences for a terminal; the same without colour for a file or a pipe."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import dropwhile, islice

from rich.bar import Bar
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deca_ds.data.prepare import COMMON, TRAIN
from deca_ds.printing import print_line
from deca_ds.tools.data.histogram import bins, line, merged, quantile
from deca_ds.tools.data.look import Client, Found, Piece, Shown
from deca_ds.tools.data.repeats import Pair

_TRAINED = "bold green"
_OPEN, _CLOSE = "[[", "]]"  # around what is trained, where there is no colour
_LONGEST = 600  # characters of a run of tokens that are shown, from its two ends
_MOST_LABELS = 30
_LABEL_WIDTH = 9  # of a client's column in the table of labels


def show(console: Console, found: Found) -> None:
    """Print everything about what has been found."""

    def tell(text: str, style: str = "") -> None:
        print_line(console, text, style)

    for told in found.files:
        tell(told)
    if found.sample is not None:
        tell(
            f"A SAMPLE: the first {found.sample} rows of each file. All counts are the sample's, and a run shares the "
            "rows out among the clients in another way.",
            "yellow",
        )
    for number, why in found.elsewhere.items():
        tell(f"client {number} is left out, as this machine does not have its files: {why}")
    console.print(_counts(found.clients))
    console.print(_lengths(found))
    _histogram(console, found)
    for table in _labels(console, found):
        console.print(table)
    _repeats(console, found)
    for note in dict.fromkeys(note for client in found.clients for note in client.data.notes):
        tell(f"data: {note}")
    for client in found.clients:
        for shown in client.shown:
            console.print(_heading(client, shown), highlight=False)
            console.print(Padding(rendered(shown.pieces, colour=console.color_system is not None), (0, 0, 1, 2)))


def rendered(pieces: Sequence[Piece], *, colour: bool) -> Text:
    """Mark the trained tokens of a sequence. Long runs lose their middle, and characters that would steer a terminal
    are written out."""
    text = Text()
    for piece in pieces:
        shown = _shortened(_harmless(piece.text))
        if not piece.trained:
            text.append(shown)
        elif colour:
            text.append(shown, _TRAINED)
        else:
            text.append(f"{_OPEN}{shown}{_CLOSE}")
    return text


def _counts(clients: Sequence[Client]) -> Table:
    table = Table(title="data of each client")
    for column in ("client", "examples", "dropped", "cut", "rows", "tokens", "trained", "masked"):
        table.add_column(column, justify="right")
    for client in clients:
        of = client.data.summary
        trained = of["target_tokens"] / of["train_tokens"]
        numbers = (of["client"], of["examples"], of["dropped"], of["cut"], of["train"], of["train_tokens"])
        table.add_row(*map(_short, numbers), f"{trained:.0%}", f"{1 - trained:.0%}")
    return table


def _lengths(found: Found) -> Table:
    table = Table(title=f"tokens of an example before it is cut to data.max_length = {found.config.data.max_length}")
    for column in ("client", "shortest", "median", "95%", "99%", "longest"):
        table.add_column(column, justify="right")
    table.add_column("histogram")
    reach = max(client.data.lengths[-1][0] for client in found.clients)
    for client in found.clients:
        counts = client.data.lengths
        numbers = [counts[0][0], *(quantile(counts, share) for share in (0.5, 0.95, 0.99)), counts[-1][0]]
        shape = line(bins(counts, found.config.data.max_length, reach))
        table.add_row(str(client.number), *(f"{number:,}" for number in numbers), shape)
    return table


def _histogram(console: Console, found: Found) -> None:
    of = bins(merged([client.data.lengths for client in found.clients]), found.config.data.max_length)
    most = max(each.count for each in of)
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for justify in ("right", "left", "right", "left"):
        table.add_column(justify=justify)
    width = max(10, min(60, console.width - 45))
    for each in dropwhile(lambda each: not each.count, of):
        style = "red" if each.cut else "cyan"
        bar = Bar(most, 0, each.count, width=width, color=style)
        table.add_row(f"{each.low:,} to {each.high:,}", bar, f"{each.count:,}", Text("cut" * each.cut, style))
    print_line(console, f"tokens, and how many examples of {_whose(found)} have so many")
    console.print(table)
    console.print()


def _short(number: int) -> str:
    return f"{number:,}" if number < 10**6 else f"{number / 10**6:,.1f}M"


def _whose(found: Found) -> str:
    numbers = [client.number for client in found.clients]
    return f"client {numbers[0]}" if len(numbers) == 1 else f"these {len(numbers)} clients"


def _labels(console: Console, found: Found) -> list[Table]:
    """Tabulate how many examples each client trains on, by label or else by group; as many clients a table as fit."""
    by_label = bool(found.clients[0].labels)
    columns: dict[str, Counter[str]] = {}
    for client in found.clients:
        counts = client.labels[TRAIN] if by_label else Counter(client.data.summary["labels"])
        columns[f"client {client.number}"] = counts
    total = sum(columns.values(), Counter())
    if not total:
        return []
    if by_label and (common := found.clients[0].labels[COMMON]):
        columns["common eval"] = common
        total += common
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    wide = max(len(name) for name in names[:_MOST_LABELS])
    at_once = max(1, (console.width - min(wide, 30) - 4) // (_LABEL_WIDTH + 3))
    title = "training examples by label" if by_label else f"training examples by {found.config.data.partition_column}"
    tables = []
    of_clients = iter(columns)
    while part := list(islice(of_clients, at_once)):
        table = Table(title=Text(title))
        table.add_column("label" if by_label else "group", max_width=30, overflow="ellipsis", no_wrap=True)
        for column in part:
            table.add_column(column, justify="right")
        for name in names[:_MOST_LABELS]:
            table.add_row(Text(_harmless(name)), *(f"{columns[column][name] or '-'}" for column in part))
        if len(names) > _MOST_LABELS:
            rest = names[_MOST_LABELS:]
            table.add_row(f"{len(rest)} more", *(str(sum(columns[column][name] for name in rest)) for column in part))
        tables.append(table)
    return tables


def _repeats(console: Console, found: Found) -> None:
    of, several = found.repeats, len(found.clients) > 1
    table = Table(title="examples that occur more than once")
    titles = [
        "client",
        "repeated",
        *(["also at others"] * several),
        "own eval",
        "own eval trained on",
    ]
    for title in titles:
        table.add_column(title, justify="right")
    leaks = of.common
    for client in found.clients:
        each, scored = of.clients[client.number], client.data.summary["own_evaluation"]
        numbers = [client.number, each.again, *([each.elsewhere] * several), scored, each.scored]
        table.add_row(*(f"{number:,}" for number in numbers))
        leaks += each.scored
    console.print(table)
    common = found.clients[0].data.summary["common_evaluation"]
    if common:
        print_line(console, f"common evaluation set: {common:,} examples, {of.common:,} of them trained on")
    else:
        print_line(console, "no common evaluation set")
    if leaks:
        told = f"{leaks:,} scored examples are trained on, so scores show memory more than skill"
        print_line(console, f"WARNING: {told}")
    for what, pairs in (("again", of.again), ("elsewhere", of.elsewhere), ("scored", of.scored)):
        for pair in pairs:
            print_line(console, f"  {_pair(what, pair)}")


def _pair(what: str, pair: Pair) -> str:
    one, other = ("the common set" if client is None else f"client {client}" for client in pair.clients)
    first, second = map(_harmless, pair.places)
    if what == "again":
        return f"{one} trains on {first} and on {second}"
    if what == "elsewhere":
        return f"{one} trains on {first}, and {other} on {second}"
    return f"{one} is scored on {first}, and {other} trains on {second}"


def _heading(client: Client, shown: Shown) -> Text:
    of = f"sequence {shown.number + 1:,} of {client.data.summary['train']:,}"
    return Text(f"client {client.number}, {of}: {shown.tokens:,} tokens, {shown.targets:,} of them trained", "bold")


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST + 60:
        return text
    left = len(text) - _LONGEST
    return f"{text[: _LONGEST // 2]} ... {left:,} characters ... {text[-_LONGEST // 2 :]}"


def _harmless(text: str) -> str:
    """Return the text without characters that move a cursor or change the direction of writing."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Cs") else f"\\u{ord(one):04x}"
        for one in text
    )
