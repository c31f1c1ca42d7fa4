"""Writes tests/tokenizer/golden/families.json: conversations as transformers renders them.

    python -m scripts.goldens.chat_templates

Today's date stands as YYYY-MM-DD, which is as long.
Spans are those of {% generation %} blocks.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from tests.tokenizer.family_templates import CHATS, FAMILIES, TOOLS, cases

PATH = Path(__file__).resolve().parents[2] / "tests/tokenizer/golden/families.json"


def main() -> None:
    told = []
    for family, chat, tools, more, options in cases():
        texts, spans = render_jinja_template(
            [CHATS[chat]],
            tools=TOOLS if tools else None,
            chat_template=FAMILIES[family].template,
            return_assistant_tokens_mask="{%- generation" in FAMILIES[family].template,
            add_generation_prompt=more,
            bos_token=FAMILIES[family].special[0],
            **options,
        )
        today = datetime.now().strftime("%Y-%m-%d")
        told.append(
            {
                "text": texts[0].replace(today, "YYYY-MM-DD"),
                "spans": [list(span) for span in spans[0]] if spans else [],
            }
        )
    PATH.write_text(json.dumps(told, ensure_ascii=False, indent=0) + "\n", "utf-8")
    print(f"{len(told)} cases in {PATH}")


if __name__ == "__main__":
    main()
