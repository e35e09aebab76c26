"""Write the demo's data: short messages to a service desk, each with the desk that should get it.

`python examples/demo/make_data.py [FOLDER]` writes train.jsonl and evaluation.jsonl, the same bytes every time, into
FOLDER (data/ beside this file when left out). Each line is {"text": ..., "label": ...}.

A message is an opening, a request and a closing. Openings and closings say nothing about the desk, the things people
write about (parcels, laptops, orders, days) turn up at several desks, and no message contains the name of a desk: what
tells is how the request is put. The texts are the project's own.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

SEED = 2606
TRAIN_PER_LABEL = 300
EVALUATION_PER_LABEL = 50

WORDS: dict[str, list[str]] = {
    "item": [
        "laptop", "jacket", "camera", "headset", "desk lamp", "backpack", "tablet", "coffee machine", "keyboard",
        "phone", "watch", "monitor", "pair of boots", "tent", "bicycle light", "office chair",
    ],
    "device": ["laptop", "monitor", "keyboard", "printer", "tablet", "phone", "headset", "camera", "docking station"],
    "gadget": ["laptop", "tablet", "phone", "headset", "camera", "watch"],
    "place": ["kitchen", "meeting room", "office", "garage", "reception", "canteen", "lobby", "workshop"],
    "event": [
        "training", "guided tour", "workshop", "yoga class", "team dinner", "check-up", "fitting", "first lesson",
    ],
    "account": ["account", "profile", "customer page", "staff portal", "mailbox", "loyalty account"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "when": ["yesterday", "this morning", "last week", "two days ago", "last night", "on Monday", "just now"],
    "since": [
        "since Monday", "since the update", "since last night", "for two days", "since this morning", "for weeks",
    ],
    "month": ["January", "March", "April", "June", "August", "October", "December"],
    "few": ["two", "three", "four", "five", "six", "eight", "ten"],
    "amount": ["12 euros", "19 euros", "30 euros", "45 dollars", "60 dollars", "80 pounds", "99 euros"],
    "helper": ["driver", "technician", "man at the counter", "colleague on the phone", "team", "lady in the shop"],
}  # fmt: skip

OPENINGS = [
    "", "", "", "Hello, ", "Hi there, ", "Good morning, ", "Dear team, ", "Hello again, ", "Excuse me, ", "Quick one: ",
    "I hope you are well; ", "Sorry to bother you, ", "As said on the phone, ",
]  # fmt: skip

CLOSINGS = [
    ".", ".", ".", ", thanks.", ", many thanks.", ", best wishes.", ", please call me back.",
    ", as I told your {helper}.", ", and I leave on {day}.", ", kind regards.", ", I can be reached until {day}.",
]  # fmt: skip

REQUESTS: dict[str, list[str]] = {
    "billing": [
        "your invoice for {month} lists the {item} twice",
        "I was charged {amount} more than the price on the page",
        "the invoice shows the wrong tax number",
        "my card was debited {few} times for one order",
        "why does the {month} statement say {amount}",
        "please send the invoice for the {item} to our accounts office",
        "the discount of {amount} is missing from my invoice",
        "we paid {amount} {when} and still got a reminder to pay",
        "can I pay for the {item} in {few} instalments",
        "the amount due does not match the offer for the {event}",
    ],
    "booking": [
        "could you reserve {few} places for the {event} on {day}",
        "I need to move my appointment from {day} to {day}",
        "is there still a free slot for the {event} in {month}",
        "please put us down for the {event}, we are {few} people",
        "we would like the {place} on {day} for {few} hours",
        "can I change my seat for the {event}",
        "I want to come to the {event} but {day} looks full",
        "please hold a table for {few} on {day}",
        "what times are open for a {event} in {month}",
        "the calendar gave my appointment on {day} to somebody else",
    ],
    "delivery": [
        "my parcel with the {item} has not arrived yet",
        "the tracking page says the {item} is still in the depot",
        "the courier left the {item} at the wrong door {when}",
        "when will the {item} be shipped",
        "the {item} was due on {day} and nobody rang the bell",
        "please leave the parcel at the {place}",
        "the box came {when} but the {item} was not in it",
        "can you send the {item} to my new address",
        "the tracking number has not moved {since}",
        "our shipment of {few} boxes is stuck at customs",
    ],
    "hardware": [
        "the screen of my {device} went black {when}",
        "my {device} makes a loud noise and gets hot",
        "the battery of the {gadget} lasts only {few} hours",
        "the printer in the {place} jams on every page",
        "{few} keys on the {device} are stuck",
        "the {device} has not switched on {since}",
        "the cable of the {device} is torn",
        "there is a crack in the {device} and the fan rattles",
        "we need a spare charger for the {device} in the {place}",
        "the {device} smells burnt and the light blinks",
    ],
    "login": [
        "I forgot the password of my {account}",
        "the reset link for my {account} has expired",
        "my {account} is locked after {few} wrong attempts",
        "the code for my {account} never reaches my phone",
        "it says that my user name is unknown {since}",
        "I have not been able to sign in to the {account} {since}",
        "please unlock the {account} of our new colleague",
        "my password was refused {few} times on the {account}",
        "the {account} asks for a code from a phone that I have lost",
        "how do I change the password on my {gadget}",
    ],
    "network": [
        "the wifi in the {place} drops every {few} minutes",
        "pages have loaded very slowly on every {gadget} {since}",
        "the connection to the server broke off {when}",
        "there is no signal in the {place}",
        "the VPN says it cannot reach the office",
        "video calls have been freezing in the {place} {since}",
        "our router in the {place} restarts {few} times a day",
        "my {gadget} finds the wifi but stays offline",
        "the internet has been down in the {place} {since}",
        "downloads stop halfway when I use the cable in the {place}",
    ],
    "praise": [
        "the {helper} was so friendly {when}",
        "I love the {item}, it is even better than I hoped",
        "what a wonderful {event}, we enjoyed it a lot",
        "your {helper} solved it in {few} minutes, great work",
        "I just want to say how happy we are with the {item}",
        "please thank the {helper} for being so patient {when}",
        "{few} stars for the {event} from all of us",
        "the {item} is a joy to use every {day}",
        "excellent service, the {helper} went out of the way for us",
        "we will gladly tell our friends about the {event}",
    ],
    "refund": [
        "I sent the {item} back {when} and want my money",
        "please pay me back the {amount} for the {item}",
        "the {item} does not fit, how do I return it",
        "the {event} was called off, so I would like the {amount} back",
        "I returned the {item} in {month} and have seen no money yet",
        "the {item} is not what I ordered, I want to give it back",
        "you took back the {item} but the {amount} are not on my card",
        "may I return the {item} after {few} weeks",
        "where is the return label for the {item}",
        "I changed my mind about the {item}, can I have the {amount} back",
    ],
}


def message(label: str, rng: random.Random) -> str:
    """One message for the desk `label`: opening, request and closing, every {slot} filled from WORDS."""
    text = rng.choice(OPENINGS) + rng.choice(REQUESTS[label]) + rng.choice(CLOSINGS)
    text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(WORDS[slot[1]]), text)
    return text[0].upper() + text[1:]


def make(seed: int, per_label: int, taken: set[str]) -> list[dict[str, str]]:
    """`per_label` messages for every desk, shuffled; no text twice and none that is in `taken`, which grows by them."""
    rng = random.Random(seed)
    rows = []
    for label in REQUESTS:
        wanted = len(rows) + per_label
        while len(rows) < wanted:
            text = message(label, rng)
            if text not in taken:
                taken.add(text)
                rows.append({"text": text, "label": label})
    rng.shuffle(rows)
    return rows


def main(folder: Path) -> None:
    """Write both files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for name, seed, per_label in (("evaluation", SEED + 1, EVALUATION_PER_LABEL), ("train", SEED, TRAIN_PER_LABEL)):
        lines = [json.dumps(row) + "\n" for row in make(seed, per_label, taken)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
