"""Draw the pictures of the manual, docs/idea.svg and docs/client_states.svg: python docs/draw_pictures.py"""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
PAPER, INK, GREY, LINE, IDLE = "#fbfcfd", "#1f2933", "#52606d", "#9aa5b1", "#d5dce4"
ACTIVE, GOOD, BAD, LATE = "#e8710a", "#2f855a", "#c53030", "#b7791f"
DATA = ("#3b7dd8", "#2f9e8f", "#8e63c7")
SHARES = ((30, 8, 16), (6, 28, 10), (14, 6, 30), (22, 22, 5))  # of three labels, at each of four clients


def text(x: float, y: float, words: str, size: int = 14, colour: str = INK, anchor: str = "start", bold: bool = False):
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"' + ' font-weight="bold"' * bold
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", radius: float = 8):
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" stroke="{stroke}" '
        'stroke-width="1.5"/>'
    )


def arrow(path: str, colour: str = GREY, dashed: bool = False):
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash} marker-end="url(#head{colour[1:]})"/>'
    )


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """An SVG on paper of its own, so that it can be read on light and on dark pages."""
    heads = "".join(
        f'<marker id="head{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
        for colour in (GREY, ACTIVE, GOOD, BAD, LATE)
    )
    body = "\n".join([box(1, 1, width - 2, height - 2, PAPER, IDLE, 12), *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img">\n<title>{escape(title)}</title>\n'
        f"<defs>{heads}</defs>\n{body}\n</svg>\n"
    )


def client(x: float, y: float, number: int) -> list[str]:
    """A client of two ranks: its own data, and its model in blocks of which one is active."""
    parts = [box(x, y, 190, 140, "#ffffff", LINE), text(x + 12, y + 22, f"client {number}", bold=True)]
    for label, share in enumerate(SHARES[number]):
        parts.append(box(x + 14 + 17 * label, y + 104 - share * 1.7, 13, share * 1.7, DATA[label], radius=2))
    parts += [f'<path d="M{x + 10} {y + 105} h56" stroke="{LINE}"/>', text(x + 12, y + 124, "own data", 12, GREY)]
    for block in range(5):
        for rank in range(2):
            fill = ACTIVE if block == 2 else IDLE
            parts.append(box(x + 88 + 46 * rank, y + 32 + 15 * block, 43, 12, fill, radius=2))
    return parts + [text(x + 109 + 46 * rank, y + 124, f"rank {rank}", 12, GREY, "middle") for rank in range(2)]


def idea() -> str:
    parts = [text(36, 40, "Every client trains its own copy of the model on its own data", 15, bold=True)]
    for number, (x, y) in enumerate(((36, 62), (336, 62), (336, 282), (36, 282))):
        parts += client(x, y, number)
    parts += [
        *(arrow(f"M281 {y} H{x}", ACTIVE) for y in (132, 352) for x in (230, 332)),
        *(arrow(f"M{x} 242 V{y}", ACTIVE) for x in (131, 431) for y in (206, 278)),
        text(281, 235, "neighbours exchange", 13, ACTIVE, "middle", bold=True),
        text(281, 253, "the active block only", 13, ACTIVE, "middle", bold=True),
        f'<path d="M560 28 V424" stroke="{IDLE}" stroke-width="1.5"/>',
        text(590, 40, "One inner step of the active block", 15, bold=True),
    ]
    steps = (
        ("Gradient on the client's own batch", "ZeRO-3 gathers layers inside the client"),
        ("Local Adam step", "float32 masters and moments of this block only"),
        ("Average it with the neighbours", "over MPI or torch, by the graph's weights w_ij"),
        ("Correct the moments", "by the signal h: what the averaging changed"),
    )
    for i, (head, rest) in enumerate(steps):
        y = 62 + 76 * i
        parts += [
            box(590, y, 352, 58, "#ffffff", ACTIVE if i == 2 else LINE),
            f'<circle cx="616" cy="{y + 29}" r="14" fill="{ACTIVE if i == 2 else GREY}"/>',
            text(616, y + 34, str(i + 1), 14, "#ffffff", "middle", bold=True),
            text(640, y + 24, head, 14, bold=True),
            text(640, y + 44, rest, 12, GREY),
        ]
        if i < len(steps) - 1:
            parts.append(arrow(f"M758 {y + 58} V{y + 74}"))
    parts += [
        arrow("M942 319 C982 319 982 91 946 91"),
        text(590, 374, "R such steps, then the next block is active;", 13, GREY),
        text(590, 393, "T rounds over all blocks.", 13, GREY),
        text(590, 418, "deca export: the mean of all models, or one client's.", 13, GREY),
    ]
    return drawing(996, 450, "Clients train on their own data and average one block at a time with neighbours", parts)


def state(x: float, y: float, name: str, rest: str, colour: str = GREY, width: float = 176) -> list[str]:
    """A state, centred on x."""
    return [
        box(x - width / 2, y, width, 56, "#ffffff", colour),
        text(x, y + 23, name, 15, colour if colour != GREY else INK, "middle", bold=True),
        text(x, y + 43, rest, 12, GREY, "middle"),
    ]


def client_states() -> str:
    parts = [
        *state(120, 170, "starting", "checks, data, model"),
        *state(460, 170, "training", "in the job", GOOD),
        *state(820, 170, "DONE", "model saved", GOOD),
        *state(460, 30, "late", "left out, on both ends", LATE),
        *state(460, 330, "out", "dead, hung, cut off, diverged", BAD, 216),
        *state(120, 330, "joining", "takes a neighbour's state"),
        *state(820, 60, "STOPPED", "checkpoint saved", LATE),
        *state(820, 330, "FAILED", "the job ends, with a reason", BAD, 200),
        arrow("M208 198 H368"),
        arrow("M548 198 H728", GOOD),
        arrow("M440 170 V90", LATE),
        arrow("M480 86 V166", LATE),
        text(430, 125, "gossip.wait_s", 12, GREY, "end"),
        text(430, 141, "is over", 12, GREY, "end"),
        text(490, 125, "both reach the", 12, GREY),
        text(490, 141, "same averaging", 12, GREY),
        arrow("M548 184 L728 100", LATE),
        text(652, 164, "told to stop, or too few clients", 12, GREY),
        arrow("M440 226 V326", BAD),
        text(430, 262, "on_failure=continue:", 12, GREY, "end"),
        text(430, 278, "the others continue", 12, GREY, "end"),
        arrow("M548 212 L728 326", BAD),
        text(670, 262, "on_failure=stop,", 12, GREY),
        text(670, 278, "the default", 12, GREY),
        arrow("M352 358 H212"),
        text(282, 350, "--join, or", 12, GREY, "middle"),
        text(282, 376, "return_s", 12, GREY, "middle"),
        arrow("M160 330 C180 270 250 230 368 214", GOOD),
        text(112, 290, "between two", 12, GREY, "middle"),
        text(112, 306, "inner steps", 12, GREY, "middle"),
        text(70, 416, "named in cluster.absent", 12, GREY),
        arrow("M60 420 V390"),
        arrow("M60 120 V166"),
        text(40, 112, "launched", 12, GREY),
        arrow("M820 386 V432 H14 V198 H29", GREY, dashed=True),
        text(
            520, 424, "run.resume, by hand or by deca supervise: all start again from a checkpoint", 12, GREY, "middle"
        ),
        arrow("M820 60 V14 H150 V166", GREY, dashed=True),
        text(300, 32, "run.resume", 12, GREY, "middle"),
    ]
    return drawing(940, 446, "The states of a client, from its start to the end of the job", parts)


if __name__ == "__main__":
    (FOLDER / "idea.svg").write_text(idea(), encoding="utf-8")
    (FOLDER / "client_states.svg").write_text(client_states(), encoding="utf-8")
