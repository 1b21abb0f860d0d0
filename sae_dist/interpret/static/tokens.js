"use strict";
// Tokens as text. An entry of the token table is a string, ["special", name], or ["hex", bytes] for parts of characters.

const CONTROL = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffd]/;
const INVISIBLE = new RegExp(CONTROL.source + "|[^\\S ]| {3,}", "gu");

/** Text nodes and quiet marks for what cannot be seen; where `breaks`, line breaks and tabs also move the text. */
function visible(text, breaks = false) {
  const parts = [];
  const move = (space) => (breaks ? make("span", { className: "break" }, space) : "");
  const quiet = (mark, title) => make("span", { className: "quiet", title }, mark);
  if (/^ {1,2}$/.test(text)) return [quiet("·".repeat(text.length), "")];
  let from = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    if (match.index > from) parts.push(text.slice(from, match.index));
    from = match.index + match[0].length;
    const code = match[0].codePointAt(0);
    if (code === 32) parts.push(make("span", { className: "run" }, match[0]));
    else if (code === 10) parts.push(quiet("↵", "line feed"), move("\n"));
    else if (code === 9) parts.push(quiet("→", "tab"), move("\t"));
    else if (code < 32) parts.push(quiet(String.fromCodePoint(0x2400 + code), "control character"));
    else if (code === 0xfffd) parts.push(quiet("�", "part of a character"));
    else parts.push(quiet("␣", `U+${code.toString(16).toUpperCase().padStart(4, "0")}`));
  }
  if (from < text.length) parts.push(text.slice(from));
  return parts;
}

/** One token alone, for a list: a leading space as a quiet dot, bytes in hexadecimal. */
function tokenAlone(entry, { trim = false } = {}) {
  if (Array.isArray(entry)) {
    const [kind, text] = entry;
    const shown = kind === "hex" ? text.replace(/../g, "$& ").trim() : text;
    return make("span", { className: "quiet", title: kind === "hex" ? "bytes of a character" : "special token" }, shown);
  }
  const text = trim && entry.trim() ? entry.trim() : entry;
  const spaces = text.length - text.trimStart().length;
  const lead = /^ +\S/.test(text) ? [make("span", { className: "quiet" }, "·".repeat(spaces))] : [];
  return make("span", {}, ...lead, ...visible(lead.length ? text.slice(spaces) : text));
}

/** What to write for each token of a passage: the characters that it completes, so bytes join across tokens. */
function passage(entries) {
  const texts = entries.map((entry) => (Array.isArray(entry) ? (entry[0] === "special" ? entry[1] : "") : entry));
  const loose = entries.map(() => []);
  const bytes = [];
  const finish = () => {
    for (let i = 0; i < bytes.length; ) {
      const lead = bytes[i].byte;
      const length = lead < 0x80 ? 1 : lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
      const group = bytes.slice(i, i + length);
      const text = decodeUtf8(group.map((b) => b.byte));
      const owner = group[group.length - 1].owner;
      if (text !== null) texts[owner] += text;
      else loose[bytes[i].owner].push(lead.toString(16));
      i += text !== null ? length : 1;
    }
    bytes.length = 0;
  };
  entries.forEach((entry, owner) => {
    if (!Array.isArray(entry) || entry[0] !== "hex") return finish();
    for (const pair of entry[1].match(/../g)) bytes.push({ byte: parseInt(pair, 16), owner });
  });
  finish();
  return texts.map((text, i) => ({ text, loose: loose[i] }));
}

function decodeUtf8(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return null;
  }
}

/** The text by which a token is searched. */
function searchable(entry) {
  return Array.isArray(entry) ? (entry[0] === "special" ? entry[1] : "") : entry;
}
