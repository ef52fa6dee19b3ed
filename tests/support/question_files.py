"""SQuAD's and HotpotQA's files in the form in which they were published, with invented texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ARTICLES, PARAGRAPHS = 6, 8
ROWS, CONTEXTS = 12, 6
_PEOPLE = ("Ilse", "Tomasz", "Meera", "Odd", "Paloma", "Kofi", "Yuki", "Bram", "Sunniva", "Radu", "Ngozi", "Elio")
_TRADES = ("mends sails", "keeps bees", "tunes organs", "grafts plums", "binds books", "casts bells", "reads tides")
_FILLER = ("The ferry leaves at noon.", "Snow lies on the pass.", "The market is small.", "A dog sleeps by the door.")


def squad(version: int = 2, seed: int = 0) -> dict[str, Any]:
    """`ARTICLES` articles of `PARAGRAPHS` paragraphs, one question each, in version 2 beside one that has no answer."""
    rng = random.Random(f"squad/{seed}")
    towns = [f"Town{number}" for number in range(ARTICLES * PARAGRAPHS)]
    data = []
    for article in range(ARTICLES):
        paragraphs = []
        for town in towns[article * PARAGRAPHS : (article + 1) * PARAGRAPHS]:
            person, trade = rng.choice(_PEOPLE), rng.choice(_TRADES)
            context = f"In {town} {person} {trade}. {_filler(rng)}"
            start = context.index(person)
            answers = [{"text": person, "answer_start": start}, {"text": f"{person} {trade}", "answer_start": start}]
            asked = {"id": town, "question": f"Who works in {town}?", "answers": [answers[0], *answers]}
            unknown = {"id": f"{town}-2", "question": f"Who left {town}?", "answers": [], "is_impossible": True}
            qas = [unknown, asked | {"is_impossible": False}] if version == 2 else [asked]
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": f"Article {article}", "paragraphs": paragraphs})
    return {"version": f"v{version}.0", "data": data}


def hotpotqa(seed: int = 0) -> list[dict[str, Any]]:
    """`ROWS` questions with two supporting paragraphs among `CONTEXTS`."""
    rng = random.Random(f"hotpotqa/{seed}")
    rows = []
    for number in range(ROWS):
        person, river = f"Painter{number}", f"River{number}"
        needed = [
            [person, [f"{person} was born by {river}.", f" {_filler(rng)}"]],
            [river, [f"{river} flows through Province{number}.", f" {_filler(rng)}"]],
        ]
        places = [f"Place {number}-{at}" for at in range(CONTEXTS - 2)]
        others = [[place, [_filler(rng), f" {place} is old."]] for place in places]
        context = [*needed, *others]
        rng.shuffle(context)
        rows.append(
            {
                "_id": str(number),
                "question": f"In which province was {person} born?",
                "answer": f"Province{number}",
                "type": "bridge",
                "level": "easy",
                "supporting_facts": [[person, 0], [river, 0]],
                "context": context,
            }
        )
    return rows


def write_question_files(folder: Path) -> Path:
    """Both files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dev-v2.0.json").write_text(json.dumps(squad()), encoding="utf-8")
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpotqa()), encoding="utf-8")
    return folder


def _filler(rng: random.Random) -> str:
    return " ".join(rng.choices(_FILLER, k=rng.randint(6, 12)))
