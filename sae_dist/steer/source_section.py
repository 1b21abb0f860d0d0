"""What is shown of the tokens that latents read from."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from sae_dist.steer.html import chips, latent, shaded, shown, table


def source_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a terminal shows."""
    for each in found.get("sources", ()):
        if each["position"] is None:
            yield f"{latent(each)} is silent on the prompt"
            continue
        tokens = found["prompt_tokens"]
        yield (
            f"{latent(each)} is {each['value']:.3g} at {tokens[each['position']]!r}; its pre-activation is "
            + ", ".join(f"{value:+.3f} {words}" for words, value in _terms(each).items())
        )
        foremost = sorted(enumerate(each["by_token"]), key=lambda own: -abs(own[1]))[:5]
        yield "  from " + ", ".join(f"{tokens[at]!r} {value:+.3f}" for at, value in foremost)


def source_section(found: Mapping[str, Any]) -> str:
    own = found.get("sources")
    if own is None:
        return ""
    rows = "".join(_row(each, found["prompt_tokens"]) for each in own)
    return (
        '<p class="note">Each latent where it is most active in the prompt, without a clamp: its pre-activation as a '
        "sum, of what the residual stream holds there before the layer, what the layer's attention brings from every "
        "token (shaded; the other colour lowers it), what its MLP adds, and biases. The pattern of attention is taken "
        "as it is: why the heads look there is not said.</p>"
        + table(("latent", "fires on", "at", "terms", "heads", "brought from"), rows)
    )


def _terms(each: Mapping[str, Any]) -> dict[str, float]:
    terms = {
        "in the stream": each["stream"], f"by attention of layer {each['layer']}": sum(each["by_token"]),
        "by its MLP": each["mlp"], "by biases": each["bias"],
    }  # fmt: skip
    return {words: value for words, value in terms.items() if value is not None}


def _row(each: Mapping[str, Any], tokens: list[str]) -> str:
    head = f"<tr><td>{each['latent']}</td><td>{chips(each['label'])}</td>"
    if each["position"] is None:
        return f'{head}<td colspan="4">silent on the prompt</td></tr>'
    largest = max(map(abs, each["by_token"])) or 1.0
    terms = "<br>".join(f"{value:+.3f} {escape(words)}" for words, value in _terms(each).items())
    heads = "<br>".join(f"{value:+.3f} head {head}" for head, value in each["heads"])
    place = f"{shown(tokens[each['position']])}<br>position {each['position']}, value {each['value']:.3g}"
    text = shaded(tokens, each["by_token"], largest)
    sums = "".join(f'<td class="terms">{cell}</td>' for cell in (place, terms, heads))
    return f'{head}{sums}<td class="text">{text}</td></tr>'
