"""A stream of short conversations whose turns end with the separator, and by hand, which of its tokens are rows."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from sae_dist.text.jsonl import JsonlText
from sae_dist.text.stream import TokenStream
from sae_dist.text.tokenize import tokenize

END = "<|endoftext|>"  # of the tiny models: BOS and EOS in one
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONTEXT, N_TOKENS = 10, 200


def stream(folder: Path, tokenizer: Any, *, opens: str = "", turns: str = "assistant") -> TokenStream:
    """The tokens of conversations that the template opens with `opens`."""
    (folder / "template.jinja").write_text(opens + TEMPLATE)
    talks = [[{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}] for i in range(9)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"talk": talk}) + "\n" for talk in talks))
    config = JsonlText(
        path=str(folder / "talks.jsonl"), messages="talk", template=str(folder / "template.jinja"), turns=turns
    )
    return tokenize(
        config, tokenizer, context=CONTEXT, n_tokens=N_TOKENS, heldout_fraction=0, seed=0, folder=folder / "tokens"
    ).train


def rows(found: TokenStream, decode: Callable[[list[int]], str], turns: str) -> Bool[np.ndarray, "sequences context"]:
    """Which tokens become rows: of the text, a character for each token, read without the mask of the stream."""
    text = decode(found.tokens.tolist()).replace(END, "|")
    assert text.startswith("|[user]ask ") and len(text) == N_TOKENS  # one separator opens a conversation, never two
    pattern = {"assistant": r"(?<=\[assistant\])[^|]+\|?", "all": r"(?!\|\[user\])."}[turns]
    mask = np.zeros(N_TOKENS, dtype=bool)
    for match in re.finditer(pattern, text):
        mask[match.start() : match.end()] = True
    mask = mask.reshape(-1, CONTEXT)
    mask[:, 0] = False  # the first position of a sequence
    return mask
