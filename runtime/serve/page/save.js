// Conversations as files.

import { node } from "./dom.js";

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  node("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function saveJson(conversations) {
  download("phisight.json", "application/json", `${JSON.stringify({ schema: 1, conversations }, null, 2)}\n`);
}

/** Texts alone; of pictures their names. */
export function asMarkdown({ title, turns }) {
  const parts = [`# ${title}`];
  for (const turn of turns) {
    parts.push(turn.role === "user" ? "## Question" : "## Answer");
    for (const picture of turn.pictures ?? []) parts.push(`(picture: ${picture.name})`);
    if (turn.thought) parts.push(turn.thought.trim().split("\n").map((line) => `> ${line}`).join("\n"));
    if (turn.text) parts.push(turn.find ? `Find: ${turn.text.trim()}` : turn.text.trim());
    if (turn.grounding) parts.push(`Click at ${turn.grounding.point.join(", ")}`);
  }
  return `${parts.join("\n\n")}\n`;
}

export function saveMarkdown(conversation) {
  download("phisight.md", "text/markdown", asMarkdown(conversation));
}
